"""Forecast: when the requests of an elastic gang will be done, if nothing else comes.

The dealer is asked as it would be, though only when a request ends and not after each step. Standard library only.
"""

from collections.abc import Iterable, Set
from dataclasses import replace

from workers.gang.dealer import Work, deal


def forecast(works: Iterable[Work], units: int, now: float, lost: Set[int] = frozenset()) -> dict[str, float]:
    """Seconds from now until each request is done; nothing of one that has too few ranks.

    Args:
        works: those that run, as if they were at a boundary, and those that wait.
        units: ranks of the gang, a power of two.
        now: the clock.
        lost: ranks that nobody can have.
    """
    left, at, ends = {work.id: work for work in works}, now, {}
    while left and (dealt := deal(list(left.values()), (), units, at, lost)):
        seconds = {name: left[name].left_s(block.size) for name, block in dealt.items()}
        first = min(seconds, key=lambda name: seconds[name])
        passed = seconds[first]
        at += passed
        for name, block in dealt.items():
            work = left[name]
            steps = max(0.0, work.steps_left - passed / work.step_s[block.size]) if work.step_s[block.size] else 0.0
            left[name] = replace(work, steps_left=steps, at=block, stood_since=at)
        ends[first] = at - now
        del left[first]
    return ends
