"""The table of `spray top`: a row per gang, or per request of an elastic gang, with its steps and where their time
goes.

The body of `GET /v1/cluster` comes in.
"""

from typing import Any

from rich.console import Group
from rich.text import Text

from service.cli.output import gang_lines, table

SPLIT_WIDTH = 20

HEADERS = "MODEL", "STATE", "GANGS", "QUEUED", "WORK LEFT", "NOW", "A STEP  # computes = transfers . waits"

PARTS = (("computes", "#"), ("transfers", "="), ("waits", "."))
"""The parts of a step's seconds, each with its letter in the bar."""


def top_table(cluster: dict[str, Any]) -> Group:
    """A row per gang, or per request of an elastic gang, or per model without gangs."""
    rows = []
    for model in cluster["models"]:
        first = model["id"], model["state"], _gangs(model), str(model["queued"])
        gangs = [row for gang in model["gangs"] for row in _rows(gang)]
        for number, of_gang in enumerate(gangs or [("", "", "")]):
            rows.append((*(first if number == 0 else ("",) * len(first)), *of_gang))
    reasons = [Text(f"{model['id']}: {model['reason']}") for model in cluster["models"] if model["reason"]]
    return Group(table(*HEADERS, rows=rows), *reasons)


def _rows(gang: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of a gang; an elastic gang has a row for each of its requests."""
    first, *others = gang_lines(gang["now"])
    return [(f"{gang['backlog_s']:.0f} s", first, _split(gang["now"])), *(("", line, "") for line in others)]


def _gangs(model: dict[str, Any]) -> str:
    """The number of gangs that run, the number that the autoscaler wants, and why."""
    running, wanted = model["replicas"].get("RUNNING", 0), model.get("wanted_replicas")
    return str(running) if wanted is None else f"{running}, wants {wanted}: {model['wanted_reason']}"


def _split(now: dict[str, Any]) -> str:
    """Where the time of the latest timed step went; a gang of one rank exchanges nothing."""
    split = now.get("split")
    if not split:
        return ""
    bar = ""
    for part, letter in PARTS:
        bar += letter * round(SPLIT_WIDTH * split[part] / split["seconds"])
    waits = "" if split["slowest"] is None else f", for rank {split['slowest']}"
    shares = (f"{100 * split[part] / split['seconds']:.0f} %" for part, _ in PARTS)
    return f"[{bar[:SPLIT_WIDTH].ljust(SPLIT_WIDTH)}] {split['seconds']:.3f} s: {' '.join(shares)}{waits}"
