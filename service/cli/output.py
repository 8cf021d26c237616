"""Lines and tables for a person, from the bodies of `GET /v1/cluster`, `/v1/models`, `/v1/requests` and `/v1/jobs`.

Results go to standard output, everything else to standard error. A terminal gets colors, and tables that fit its width;
pipes and files get plain text, one line per row, that `grep` and `awk` can read.
"""

import contextlib
import io
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from deploy.support import Row

BAR_WIDTH = 20

STATE_STYLES = {"running": "green", "starting": "yellow", "waiting": "yellow", "asleep": "dim", "failed": "red"}


def say(line: str) -> None:
    """Print one line on standard error."""
    with contextlib.suppress(OSError):  # the terminal is gone
        print(line, file=sys.stderr, flush=True)


def show(rendered: Group) -> None:
    """Print a table on standard output."""
    if sys.stdout.isatty():
        Console().print(rendered)
    else:
        print(plain(rendered), flush=True)


def plain(rendered: Group) -> str:
    """A table as text without colors; rows are as wide as they need to be."""
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None, force_terminal=False).print(rendered)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def cluster_table(cluster: dict[str, Any]) -> Group:
    """`GET /v1/cluster`: a row per model and gang, with a bar for the gang's steps; the reasons are below."""
    devices = ", ".join(
        f"{amount['free']:g} of {amount['total']:g} {name} free" for name, amount in cluster["devices"].items()
    )
    table = _table("MODEL", "STATE", "REPLICAS", "LAYOUT", "QUEUED", "RUNNING")
    reasons = []
    for model in cluster["models"]:
        gangs = [line for gang in model["gangs"] for line in gang_lines(gang["now"])] or [""]
        _add(table, model["id"], model["state"], _replicas(model), model["layout"], str(model["queued"]), gangs[0])
        for gang in gangs[1:]:
            _add(table, "", "", "", "", "", gang)
        if model["reason"]:
            reasons.append(Text(f"{model['id']}: {model['reason']}"))
    nodes = f"{cluster['nodes']} node{'s' if cluster['nodes'] != 1 else ''}"
    return Group(Text(f"{nodes}, {devices}"), table, *reasons)


def models_table(listed: dict[str, Any]) -> Group:
    """`GET /v1/models`: a row per model with what it can be asked for."""
    table = _table("MODEL", "TASKS", "STATE", "DEFAULT SIZE", "STEPS", "ADAPTERS", "ALSO CALLED")
    for model in listed["data"]:
        defaults = model["defaults"]
        frames = f"x{defaults['num_frames']}" if defaults["num_frames"] > 1 else ""
        _add(
            table,
            model["id"],
            ", ".join(model["tasks"]) or "?",
            model["state"],
            f"{defaults['width']}x{defaults['height']}{frames}",
            str(defaults["num_inference_steps"]),
            ", ".join(model["loras"]) or "-",
            ", ".join(model["aliases"]) or "-",
        )
    return Group(table)


def support_table(rows: Sequence[Row]) -> Group:
    """The pipelines of diffusers: a row for each, served ones first."""
    table = _table("PIPELINE", "STATUS", "TASKS", "LAYOUTS", "REASON")
    for row in sorted(rows, key=lambda row: row["status"] != "served"):
        tasks, layouts = (", ".join(row[key]) or "-" for key in ("tasks", "layouts"))
        _add(table, row["pipeline"], row["status"], tasks, layouts, row["reason"] or "-")
    count = sum(row["status"] == "served" for row in rows)
    return Group(table, Text(f"{count} of {len(rows)} pipelines with a transformer are served"))


def requests_table(listed: dict[str, Any]) -> Group:
    """`GET /v1/requests`: a row per request; below, the gateways that did not answer."""
    table = _table("ID", "MODEL", "STATE", "PLACE", "ETA", "KEY", "SINCE", "STEPS")
    for one in listed["data"]:
        eta = one["eta_seconds"]
        _add(
            table,
            one["id"],
            one["model"],
            one["state"],
            str(one["position"] or "-"),
            "-" if eta is None else f"{eta:.0f} s",
            one["key"] or "-",
            _time(one["since"]),
            _bar(one["step"], one["total_steps"]),
        )
    silent = ", ".join(listed["silent_gateways"])
    return Group(table, *([Text(f"no answer from {silent}; requests there are missing")] if silent else []))


def jobs_table(listed: dict[str, Any]) -> Group:
    """`GET /v1/jobs`: a row per job."""
    table = _table("ID", "KIND", "MODEL", "STATE", "PRIORITY", "CREATED", "STEPS")
    for job in listed["data"]:
        made = [job["id"], job["kind"], job["model"], job["state"], job["priority"], _time(job["created_at"])]
        _add(table, *made, _bar(job["step"], job["total_steps"]) if job["total_steps"] else "-")
    return Group(table, *([Text("there are more: --limit")] if listed["has_more"] else []))


def job_table(job: dict[str, Any]) -> Group:
    """`GET /v1/jobs/{id}`: a row per property."""
    asked, table = job["request"], _table()
    video = f", {asked['num_frames']} frames at {asked['fps']} a second" if job["kind"] == "video" else ""
    said = {
        "id": job["id"],
        "state": job["state"],
        "error": f"{job['error']['code']}: {job['error']['message']}" if job["error"] else "",
        "place": str(job["position"] or ""),
        "steps": _bar(job["step"], job["total_steps"]) if job["total_steps"] else "",
        "model": job["model"],
        "prompt": asked["prompt"],
        "size": f"{asked['size']}{video}",
        "seeds": ", ".join(map(str, asked["seeds"])),
        "priority": job["priority"],
        "attempt": str(job["attempt"] or ""),
        "created": _time(job["created_at"]),
        "ended": _time(job["ended_at"]) if job["ended_at"] else "",
        "kept until": _time(job["expires_at"]) if job["expires_at"] else "",
        "files": ", ".join(f"{each['bytes']} bytes of {each['output_format']}" for each in job["outputs"]),
        "warnings": "; ".join(job["warnings"]),
    }
    for name, value in said.items():
        if value:
            _add(table, name, value)
    return Group(table)


def findings_table(rows: Sequence[tuple[str, str, str, str]]) -> Group:
    """The findings of `spray doctor`: level, name, what was found, and the advice, which has its own row."""
    table = _table()
    for level, name, found, advice in rows:
        _add(table, level, name, found)
        if advice:
            _add(table, "", "", f"-> {advice}")
    return Group(table)


def table(*headers: str, rows: Iterable[Sequence[str]]) -> Table:
    """A table of texts under these headers."""
    made = _table(*headers)
    for row in rows:
        _add(made, *row)
    return made


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(headers), header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    """Add a row literally: names and bars may hold brackets, which rich would read as markup."""
    table.add_row(*(Text(cell, style=STATE_STYLES.get(cell, "")) for cell in cells))


def _time(at: float) -> str:
    """Seconds since the epoch, as a time of day; with its date, unless that is today."""
    local, today = datetime.fromtimestamp(at).astimezone(), datetime.now().astimezone()
    return f"{local:%H:%M:%S}" if local.date() == today.date() else f"{local:%Y-%m-%d %H:%M:%S}"


def _replicas(model: dict[str, Any]) -> str:
    running = model["replicas"].get("RUNNING", 0)
    others = ", ".join(f"{n} {state.lower()}" for state, n in model["replicas"].items() if state != "RUNNING")
    bounds = f"{model['min_replicas']}-{model['max_replicas']}"
    return f"{running} ({bounds}{', ' + others if others else ''})"


def gang_lines(now: dict[str, Any]) -> list[str]:
    """What a gang does now: one line; for an elastic gang a line for each request, with its ranks."""
    requests = now.get("requests") or []
    return [f"{_bar(each['step'], each['total_steps'])} {_ranks(each['ranks'])}" for each in requests] or [
        gang_bar(now)
    ]


def _ranks(ranks: Sequence[int]) -> str:
    """The ranks of a request: a block, or none while it stands still."""
    if not ranks:
        return "waits"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def gang_bar(now: dict[str, Any]) -> str:
    """What a gang does now, with a bar of its steps."""
    if not now["total_steps"]:
        return str(now["phase"])
    bar, numbers = _bar(now["step"], now["total_steps"]).split(" ")
    return f"{bar} {now['phase']} {numbers}"


def _bar(step: int, total_steps: int) -> str:
    done = BAR_WIDTH * min(step, total_steps) // max(1, total_steps)
    return f"[{'#' * done}{'.' * (BAR_WIDTH - done)}] {step}/{total_steps}"
