"""The dashboards that ship with spray: fresh, sound, and every question in them has an answer from a Prometheus."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.grafana.__main__ import BOARDS, FOLDER
from deploy.grafana.builders import WIDTH, Panel, board_json
from tests.deploy.test_prometheus import FOLDER as RULES
from tests.deploy.test_prometheus import NAME, RECORDS, divisors, exported
from tests.support.observed import LATE_S, STEP_S
from tests.support.prometheus import answers, free_port, scraping

NOT_OF_A_MODEL = ("spray_disk", "spray_build")

PANELS = [(board, panel) for board in BOARDS for panels in board.rows.values() for panel in panels]
QUERIES = [
    pytest.param(expression, id=f"{board.uid}: {panel.title}: {number}")
    for board, panel in PANELS
    for number, (expression, _) in enumerate(panel.queries)
]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: str(board.uid))
def test_the_files_are_fresh(board: Any) -> None:
    assert (FOLDER / f"{board.uid}.json").read_text() == board_json(board), "run `python -m deploy.grafana`"


def test_no_file_is_left_over() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == {board.uid for board in BOARDS}


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: str(board.uid))
def test_what_grafana_reads(board: Any) -> None:
    made = json.loads(board_json(board))
    assert {variable["name"] for variable in made["templating"]["list"]} == {"datasource", "model"}
    assert len({panel["id"] for panel in made["panels"]}) == len(made["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in made["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= WIDTH and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["color"] == "green"
        for target in panel["targets"]:
            assert target["legendFormat"] and target["datasource"]["uid"] == "${datasource}"


def test_panels_ask_for_what_there_is() -> None:
    known = {*exported(), *RECORDS}
    for _, panel in PANELS:
        for expression, legend in panel.queries:
            used = set(NAME.findall(expression))
            assert used and used <= known, used - known
            grouped = {label for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")}
            labels = set(re.findall(r"{{(\w+)}}", legend))
            if grouped and not any(name in RECORDS for name in used):
                assert labels <= grouped, (panel.title, legend)


def test_nothing_is_divided_by_zero() -> None:
    """NaN of a series that no longer rises would be the value of a whole panel."""
    for _, panel in PANELS:
        for expression, _ in panel.queries:
            for divisor in divisors(expression):
                assert divisor.startswith("(") and divisor.endswith("> 0)"), (panel.title, divisor)


def test_the_chosen_models_are_asked_for() -> None:
    for board, panel in PANELS:
        for expression, _ in panel.queries:
            of_the_node = board.uid == "spray-api" or NAME.findall(expression)[0].startswith(NOT_OF_A_MODEL)
            assert ('model=~"$model"' in expression) or of_the_node, panel.title


def test_shares_have_a_unit_of_shares_and_limits_rise() -> None:
    for _, panel in PANELS:
        assert isinstance(panel, Panel)
        if panel.warn is not None and panel.alarm is not None:
            assert panel.warn < panel.alarm, panel.title


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prometheus that looks at a busy cluster, with the rules that ship; it has seen a few seconds."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    env = os.environ | {"RAY_RAYLET_PID": "1", "SPRAY_METRICS_DIR": str(folder / "metrics")}
    observed = subprocess.Popen([sys.executable, "-m", "tests.support.observed", str(port)], env=env)
    try:
        with scraping(folder, port, RULES / "rules.yml") as url:
            deadline = time.monotonic() + 120
            while not answers(url, "spray:straggler:share > 0"):
                assert observed.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
            yield url
    finally:
        observed.kill()
        observed.wait()


@pytest.mark.parametrize("expression", QUERIES)
def test_every_question_has_an_answer(prometheus: str, expression: str) -> None:
    asked = expression.replace("$__rate_interval", "1m").replace("$model", "watched")
    assert "$" not in asked
    values = [float(series["value"][1]) for series in answers(prometheus, asked)]
    assert values and all(map(math.isfinite, values)), values


def test_the_slow_rank_is_seen(prometheus: str) -> None:
    (waits,) = answers(prometheus, "spray:straggler:share")
    assert float(waits["value"][1]) == pytest.approx(LATE_S / STEP_S, rel=0.1)
    (slowest,) = answers(prometheus, "bottomk(1, spray:straggler_seconds:mean)")
    assert slowest["metric"]["rank"] == "1"
