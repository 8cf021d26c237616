"""The table of faults by kind, and what they have cost, from the JSON lines of all runs."""

import statistics
from typing import Any

HEAD = """\
| kind | faults | jobs met | of them running | served again p50 | max | all that it met ended p50 | max |
|---|---|---|---|---|---|---|---|"""


def report(lines: list[dict[str, Any]]) -> str:
    """The report of all runs.

    Args:
        lines: those of faults have `kind`, those of runs `accepted`.
    """
    faults = [line for line in lines if "kind" in line]
    noticed = [line for line in faults if not line.get("trouble")]
    rows = [
        _row(kind, [line for line in noticed if line["kind"] == kind]) for kind in sorted({f["kind"] for f in noticed})
    ]
    missed = [f"- fault {line['fault']}, {line['kind']}: {line['trouble']}" for line in faults if line.get("trouble")]
    runs = [line for line in lines if "accepted" in line]
    return "\n".join([HEAD, *rows, "", *missed, *map(_run, runs)])


def _row(kind: str, faults: list[dict[str, Any]]) -> str:
    met = [sum(fault.get(name, 0) for fault in faults) for name in ("met", "met_running")]
    seconds = [*_spread([f["served_s"] for f in faults]), *_spread([f["settled_s"] for f in faults])]
    return f"| {' | '.join(map(str, [kind, len(faults), *met, *seconds]))} |"


def _spread(seconds: list[float]) -> tuple[str, str]:
    return f"{statistics.median(seconds):.1f} s", f"{max(seconds):.1f} s"


def _run(run: dict[str, Any]) -> str:
    ends = ", ".join(f"{count} {state}" for state, count in sorted(run["states"].items()))
    said = [
        f"- Accepted {run['accepted']}, ended {sum(run['states'].values()) - len(run['lost'])} ({ends}); "
        f"{len(run['lost'])} lost, {len(run['twice'])} published twice, {len(run['unknown'])} made twice; "
        f"{run['drawn_again']} drawn again, {len(run['different'])} of them different; "
        f"{len(run['refused'])} refused submissions."
    ]
    said += [f"  - {job_id}: {why}" for job_id, why in run["lost"].items()]
    said += [
        f"  - {name}: {', '.join(run[name])}" for name in ("twice", "unknown", "different", "survived") if run.get(name)
    ]
    return "\n".join(said + [f"  - refused: {why}" for why in run["refused"][:5]])
