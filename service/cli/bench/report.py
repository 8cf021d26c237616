"""The results of a load: requests and their answers come in, counts and percentiles come out. For the command `bench`.

A percentile is the time of one of the requests: the smallest that at least this percentage does not exceed. Only
answered requests have times; errors are counted by their code.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from service.cli.bench.sending import OK, Outcome
from service.cli.output import table

PERCENTILES = (50, 90, 95, 99)


def summary(outcomes: Sequence[Outcome], unfinished: int, seconds: float, slo_s: float | None) -> dict[str, Any]:
    """All numbers of the tables and the JSON file.

    Args:
        outcomes: the requests that were answered or refused.
        unfinished: the number of interrupted requests.
        seconds: how long the load took, to the last answer.
        slo_s: seconds; a slower answer does not count as goodput. None: there is no goal.
    """
    kinds = sorted({one.kind for one in outcomes})
    parts = {kind: [one for one in outcomes if one.kind == kind] for kind in kinds}
    return {
        "seconds": seconds,
        "unfinished": unfinished,
        "errors": dict(Counter(one.code for one in outcomes if one.code != OK).most_common()),
        "total": _counts(outcomes, seconds, slo_s),
        "kinds": {kind: _counts(part, seconds, slo_s) for kind, part in parts.items()},
        "times_s": _times([one for one in outcomes if one.code == OK]),
        "sent_late_s": _spread([one.sent_late_s for one in outcomes]),
    }


def _counts(outcomes: Sequence[Outcome], seconds: float, slo_s: float | None) -> dict[str, Any]:
    took = [one.seconds for one in outcomes if one.code == OK]
    found: dict[str, Any] = {"sent": len(outcomes), "ok": len(took), "per_second": _rate(len(took), seconds)}
    if slo_s is not None:
        good = sum(each <= slo_s for each in took)
        found |= {"within_slo": good, "goodput_per_second": _rate(good, seconds)}
    return found | {"end_to_end_s": _spread(took)}


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def _times(answered: Sequence[Outcome]) -> dict[str, Any]:
    """Where the time of the answered requests went."""
    firsts = [one.first_step_s for one in answered if one.first_step_s is not None]
    stages = {
        name: [one.stages[name] for one in answered if name in one.stages] for name in ("encode", "decode", "files")
    }
    found = {
        "end to end": [one.seconds for one in answered],
        "waited": [one.waited_s for one in answered],
        "to the first step": firsts,
        "encode": stages["encode"],
        "one step": [step for one in answered for step in one.steps],
        "decode": stages["decode"],
        "files": stages["files"],
    }
    return {name: _spread(values) for name, values in found.items()}


def _spread(values: Iterable[float]) -> dict[str, float]:
    """Count, mean, percentiles and maximum; without values, only the count."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    percentiles = {f"p{p}": ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in PERCENTILES}
    return {"count": len(ordered), "mean": sum(ordered) / len(ordered), **percentiles, "max": ordered[-1]}


def tables(found: dict[str, Any]) -> Group:
    """The summary for a person."""
    total, has_slo = found["total"], "within_slo" in found["total"]
    goodput = ("IN SLO", "GOODPUT/S") if has_slo else ()
    rows = [("all", total), *found["kinds"].items()] if len(found["kinds"]) > 1 else [("all", total)]
    counts = table("REQUESTS", "SENT", "OK", "OK/S", *goodput, "P50", "P90", "P95", "P99", "MAX", rows=[
        (name, str(row["sent"]), str(row["ok"]), f"{row['per_second']:.3g}",
         *((_share(row), f"{row['goodput_per_second']:.3g}") if has_slo else ()),
         *_cells(row["end_to_end_s"]))
        for name, row in rows
    ])  # fmt: skip
    times = table("SECONDS", "COUNT", "MEAN", "P50", "P90", "P95", "P99", "MAX", rows=[
        (name, str(spread["count"]), _number(spread.get("mean")), *_cells(spread))
        for name, spread in [*found["times_s"].items(), ("sent late", found["sent_late_s"])]
    ])  # fmt: skip
    errors = [Text(f"{count} x {code}") for code, count in found["errors"].items()]
    open_ = [Text(f"{found['unfinished']} unfinished")] if found["unfinished"] else []
    return Group(Text(f"{found['seconds']:.1f} s"), counts, Text(""), times, *errors, *open_)


def _share(row: dict[str, Any]) -> str:
    return f"{row['within_slo'] / row['sent']:.1%}" if row["sent"] else "-"


def _cells(spread: dict[str, float]) -> tuple[str, ...]:
    return tuple(_number(spread.get(name)) for name in ("p50", "p90", "p95", "p99", "max"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
