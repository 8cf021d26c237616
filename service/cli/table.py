"""Bodies of the REST door as tables for a terminal: `spray ps` and `spray models`."""

from collections.abc import Sequence
from typing import Any

BAR_WIDTH = 20


def cluster_table(cluster: dict[str, Any]) -> str:
    """`GET /v1/cluster`: a line per model, below it one per gang, with a bar for what it computes."""
    devices = ", ".join(
        f"{amount['free']:g} of {amount['total']:g} {name} free" for name, amount in cluster["devices"].items()
    )
    rows = [["MODEL", "STATE", "REPLICAS", "LAYOUT", "QUEUED", "RUNNING"]]
    notes = []
    for model in cluster["models"]:
        gangs = [_gang(gang["now"]) for gang in model["gangs"]]
        first = [model["id"], model["state"], _replicas(model), model["layout"], str(model["queued"])]
        rows.append([*first, gangs[0] if gangs else ""])
        rows += [["", "", "", "", "", gang] for gang in gangs[1:]]
        if model["reason"]:
            notes.append(f"{model['id']}: {model['reason']}")
    nodes = f"{cluster['nodes']} node{'s' if cluster['nodes'] != 1 else ''}"
    return "\n".join([f"{nodes}, {devices}", *_aligned(rows), *notes])


def models_table(listed: dict[str, Any]) -> str:
    """`GET /v1/models`: a line per model with what may be asked of it."""
    rows = [["MODEL", "TASKS", "STATE", "DEFAULT SIZE", "STEPS", "ADAPTERS", "ALSO CALLED"]]
    for model in listed["data"]:
        defaults = model["defaults"]
        frames = f"x{defaults['num_frames']}" if defaults["num_frames"] > 1 else ""
        rows.append([
            model["id"],
            ", ".join(model["tasks"]) or "?",
            model["state"],
            f"{defaults['width']}x{defaults['height']}{frames}",
            str(defaults["num_inference_steps"]),
            ", ".join(model["loras"]) or "-",
            ", ".join(model["aliases"]) or "-",
        ])  # fmt: skip
    return "\n".join(_aligned(rows))


def _replicas(model: dict[str, Any]) -> str:
    running = model["replicas"].get("RUNNING", 0)
    others = ", ".join(f"{n} {state.lower()}" for state, n in model["replicas"].items() if state != "RUNNING")
    bounds = f"{model['min_replicas']}-{model['max_replicas']}"
    return f"{running} ({bounds}{', ' + others if others else ''})"


def _gang(now: dict[str, Any]) -> str:
    if not now["total_steps"]:
        return str(now["phase"])
    done = BAR_WIDTH * now["step"] // now["total_steps"]
    return f"[{'#' * done}{'.' * (BAR_WIDTH - done)}] {now['phase']} {now['step']}/{now['total_steps']}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
