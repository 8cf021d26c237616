"""Draws the dashboards from what a real Prometheus has recorded, without Grafana.

    python -m tests.benchmarks.panels FOLDER [--seconds 120] [--boards spray-overview spray-steps]

What is recorded is `tests.support.observed`: a made-up busy model on two ranks, of which one is late. So the pictures
show what the panels look like, not how fast anything is. Needs Debian's `prometheus`, and matplotlib.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from deploy.grafana.__main__ import BOARDS
from deploy.grafana.builders import Board, Panel
from tests.deploy.test_prometheus import FOLDER as RULES
from tests.support.prometheus import free_port, scraping

COLUMNS, PANEL_INCHES = 3, (4.6, 2.6)
PAUSE_S = 1.3
"""Between requests of one second, so that the gang is busy for most of the time."""

MOST_LINES = 8
"""In a legend."""

UNITS = {"s": "seconds", "percentunit": "share", "bytes": "bytes", "short": "", "reqps": "a second", "ops": "a second"}
"""Grafana's ids, in words; others as they are."""


@contextmanager
def recorded(seconds: float) -> Iterator[tuple[str, float, float]]:
    """A Prometheus that has looked on for so long: its URL, and the begin and end of what it has seen."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        env = os.environ | {"RAY_RAYLET_PID": "1", "SPRAY_METRICS_DIR": str(folder / "metrics")}
        command = [sys.executable, "-m", "tests.support.observed", str(port), str(PAUSE_S)]
        observed = subprocess.Popen(command, env=env)
        try:
            with scraping(folder, port, RULES / "rules.yml") as url:
                began = time.time()
                time.sleep(seconds)
                yield url, began, time.time()
        finally:
            observed.kill()
            observed.wait()


def series(url: str, question: str, began: float, ended: float) -> list[dict[str, Any]]:
    """What a panel asks, over time."""
    asked = question.replace("$__rate_interval", "30s").replace("$model", "watched")
    span = {"query": asked, "start": began, "end": ended, "step": 1}
    answer = httpx.get(f"{url}/api/v1/query_range", params=span, timeout=60, trust_env=False).json()
    return list(answer["data"]["result"])


def draw(axes: Axes, panel: Panel, url: str, began: float, ended: float) -> None:
    """One panel, as Grafana would: lines, the latest number, or a heat map of a histogram's buckets."""
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    lines = [
        (_legend(legend, found["metric"]), [(float(at) - began, float(seen)) for at, seen in found["values"]])
        for question, legend in panel.queries
        for found in series(url, question, began, ended)
    ]
    if panel.kind == "number":
        axes.axis("off")
        said = "\n".join(f"{name}: {points[-1][1]:.4g}" for name, points in lines[:MOST_LINES])
        axes.text(0.02, 0.6, said or "nothing", fontsize=11, va="center")
        return
    if panel.kind == "heat":
        _heat(axes, lines)
        return
    for name, points in lines:
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    for level, color in ((panel.warn, "orange"), (panel.alarm, "red")):
        if level is not None:
            axes.axhline(level, color=color, linewidth=0.8, linestyle="--")
    axes.set_ylabel(UNITS.get(panel.unit, panel.unit), fontsize=7)
    highest = max((seen for _, points in lines for _, seen in points), default=0.0)
    axes.set_ylim(0, 1.1 * max(highest, panel.alarm or 0.0) or 1.0)
    if 0 < len(lines) <= MOST_LINES:
        axes.legend(fontsize=6, loc="lower right", framealpha=0.7)


def _heat(axes: Axes, lines: list[tuple[str, list[tuple[float, float]]]]) -> None:
    """Buckets hold all that are smaller, so each is drawn less the one below it."""
    ordered = sorted(lines, key=lambda line: float(line[0].replace("+Inf", "inf")))
    times = sorted({at for _, points in ordered for at, _ in points})
    counts = [[dict(points).get(at, 0.0) for at in times] for _, points in ordered]
    own = [counts[0], *([max(0.0, m - f) for f, m in zip(*pair, strict=True)] for pair in pairwise(counts))]
    axes.imshow(own, aspect="auto", origin="lower", cmap="viridis", extent=(times[0], times[-1], 0, len(own)))
    axes.set_yticks([at + 0.5 for at in range(len(own))], [name for name, _ in ordered], fontsize=5)


def _legend(form: str, labels: dict[str, str]) -> str:
    for name, text in labels.items():
        form = form.replace(f"{{{{{name}}}}}", text)
    return form


def picture(board: Board, url: str, began: float, ended: float) -> Any:
    """All panels of a dashboard."""
    panels = [panel for row in board.rows.values() for panel in row]
    rows = -(-len(panels) // COLUMNS)
    width, height = PANEL_INCHES
    figure, grid = pyplot.subplots(rows, COLUMNS, figsize=(COLUMNS * width, rows * height), squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw(axes, panel, url, began, ended)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    figure.suptitle(board.title, fontsize=11)
    figure.tight_layout()
    return figure


def main() -> None:
    """Record, and draw."""
    names = [board.uid for board in BOARDS]
    parser = argparse.ArgumentParser(description="Draw the dashboards from recorded data.")
    parser.add_argument("folder", type=Path, help="for the pictures")
    parser.add_argument("--seconds", type=float, default=120, help="to record")
    parser.add_argument("--boards", nargs="+", choices=names, default=["spray-overview", "spray-steps"])
    given = parser.parse_args()
    matplotlib.use("Agg")
    given.folder.mkdir(parents=True, exist_ok=True)
    with recorded(given.seconds) as (url, began, ended):
        for board in (board for board in BOARDS if board.uid in given.boards):
            picture(board, url, began, ended).savefig(file := given.folder / f"{board.uid}.png", dpi=80)
            print(file)


if __name__ == "__main__":
    main()
