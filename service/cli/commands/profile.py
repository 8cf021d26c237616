"""`spray profile`: the operators of a gang's steps, with a trace of each rank for Perfetto."""

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import httpx
import typer
from rich.console import Group
from rich.table import Table

from service.cli.client import NO_LIMIT, answering, authorization, refusal, server_url, understood
from service.cli.options import Server
from service.cli.output import say, show

SHOWN = 10
"""Operators of a rank that are shown."""


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model of a server.", show_default=False)],
    steps: Annotated[int, typer.Option(min=1, max=20, help="Number of steps to profile.")] = 3,
    width: Annotated[int | None, typer.Option(help="Pixels. Default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Default: the model's.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a video. Default: the model's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the traces. Default: profile-MODEL.")] = None,
    server: Server = None,
) -> None:
    """Profile the steps of one gang, on each rank. Needs a key with the scope admin."""
    at, folder = server_url(server), output or Path(f"profile-{model}")
    given = {"model": model, "steps": steps, "width": width, "height": height, "num_frames": num_frames}
    path = f"/v1/profiles?{urlencode({name: value for name, value in given.items() if value is not None})}"
    with answering(at):
        response = httpx.post(f"{at.rstrip('/')}{path}", headers=authorization(), timeout=NO_LIMIT, trust_env=False)
    if not response.is_success:
        raise refusal(response.content, response.status_code)
    with understood(at, "POST /v1/profiles"):
        summary, traces = _unpacked(response.content)
        table = _table(summary)
    folder.mkdir(parents=True, exist_ok=True)
    for rank, trace in traces.items():
        (file := folder / f"rank-{rank}.json").write_bytes(trace)
        print(file, flush=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    show(table)
    say(f"https://ui.perfetto.dev opens the traces; {folder / 'summary.json'} has more operators")


def _unpacked(content: bytes) -> tuple[dict[str, Any], dict[int, bytes]]:
    """The content of a server's zip: the summary, and the trace of each rank as JSON.

    Raises:
        ValueError, KeyError: the zip is not one of spray.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            summary = json.loads(archive.read("summary.json"))
            ranks = [int(each["rank"]) for each in summary["ranks"]]
            return summary, {rank: gzip.decompress(archive.read(f"rank-{rank}.json.gz")) for rank in ranks}
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(str(error)) from None


def _table(summary: dict[str, Any]) -> Group:
    """The ranks of a profile, and the longest operators of its first."""
    ranks = _headed("RANK", "MS A STEP", "COMMUNICATION", "OF THAT WAITING")
    for each in summary["ranks"]:
        seconds, spent = each["seconds"], each["communication_seconds"]
        waiting = each["waiting_seconds"] / spent if spent else 0.0
        ranks.add_row(
            str(each["rank"]), f"{1e3 * seconds / each['steps']:.1f}", f"{spent / seconds:.0%}", f"{waiting:.0%}"
        )
    first = summary["ranks"][0]
    operators = _headed(f"OPERATOR ON RANK {first['rank']}", "CALLS", "HOST MS", "DEVICE MS")
    for each in first["operators"][:SHOWN]:
        operators.add_row(
            each["name"], str(each["calls"]), f"{1e3 * each['host_seconds']:.2f}", f"{1e3 * each['device_seconds']:.2f}"
        )
    size = f"{summary['width']}x{summary['height']}" + (f"x{frames}" if (frames := summary["num_frames"]) > 1 else "")
    return Group(f"{summary['model']}, {summary['layout']}, {size}", "", ranks, "", operators)


def _headed(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table
