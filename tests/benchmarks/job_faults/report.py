"""The table of faults by kind, and what they have cost, from the JSON lines of all runs."""

import statistics
from collections.abc import Sequence
from typing import Any

HEAD = """\
| kind | struck | noticed | in pairs | jobs met | running | served again p50 | max | all that it met ended p50 | max |
|---|---|---|---|---|---|---|---|---|---|"""


def report(lines: list[dict[str, Any]], kinds: Sequence[str] = ()) -> str:
    """The report of all runs. The seconds are those of faults that were noticed and came alone.

    Args:
        lines: those of faults have `kind`, those of runs `accepted`.
        kinds: that could have struck, besides those of the lines.
    """
    faults = [line for line in lines if "kind" in line]
    names = sorted({*kinds, *(fault["kind"] for fault in faults)})
    rows = [_row(name, [fault for fault in faults if fault["kind"] == name]) for name in names]
    paired = sum("beside" in fault for fault in faults)
    count = f"- {len(faults)} faults of {len({fault['kind'] for fault in faults})} kinds, {paired} of them in pairs."
    missed = [f"- fault {line['fault']}, {line['kind']}: {line['trouble']}" for line in faults if line.get("trouble")]
    runs = [line for line in lines if "accepted" in line]
    return "\n".join([HEAD, *rows, "", count, *missed, *map(_run, runs)])


def _row(kind: str, faults: list[dict[str, Any]]) -> str:
    noticed = [fault for fault in faults if not fault.get("trouble")]
    alone = [fault for fault in noticed if "beside" not in fault]
    met = [sum(fault.get(name, 0) for fault in noticed) for name in ("met", "met_running")]
    seconds = [*_spread([f["served_s"] for f in alone]), *_spread([f["settled_s"] for f in alone])]
    counts = len(faults), len(noticed), sum("beside" in fault for fault in faults)
    return f"| {' | '.join(map(str, [kind, *counts, *met, *seconds]))} |"


def _spread(seconds: list[float]) -> tuple[str, str]:
    return (f"{statistics.median(seconds):.1f} s", f"{max(seconds):.1f} s") if seconds else ("", "")


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
        f"  - {name}: {', '.join(run[name])}"
        for name in ("twice", "unknown", "different", "survived", "hasty")
        if run.get(name)
    ]
    return "\n".join(said + [f"  - refused: {why}" for why in run["refused"][:5]])
