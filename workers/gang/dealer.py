"""Dealer: which ranks each request of an elastic gang has for its next step.

Comes in: what waits, what runs, what a step takes at each degree, and the clock. Goes out: blocks of ranks. A pure
function of the standard library, called at every boundary by `workers.gang.elastic`, and by the simulation of
`tests.benchmarks.elastic`: what is simulated is what ships.

Priorities decide, then deadlines, then the least work:

1. Work that can still meet its deadline, the cheapest in rank-seconds first, each at the smallest degree that does it.
2. Work that is late anyway, on few ranks: it may not make others late. It gets more ranks the more of it there is, and
   its order is by what is left and by age, so that nobody waits without bound.
3. Ranks that are left double a request, as long as one gains by it.

Degrees are powers of two and blocks are aligned, so that every block has groups that were made at the start. Scheduling
by steps follows TetriServe (arXiv 2510.01565) and GenServe (arXiv 2604.04335).
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SLACK = 1.05
"""A deadline counts as met with this much more than the work that is left: a step may take longer than the last one."""

LATE_SHARE = 4
"""One rank of so many is for late work, as long as there is little of it."""

BACKLOG_S = 3600.0
"""Late work of more seconds than this for each of its ranks gets more ranks, before the work that is in time."""

PATIENCE_S = 30.0
"""The first of the late requests goes before those in time when it has stood still for so long."""

AGING = 0.1
"""Seconds of work by which a request moves up in each second, once it is late or if it has no deadline."""

RISE_S = 600.0
"""A request that is not there after so long has the next higher priority."""


class Block(NamedTuple):
    """Ranks of one request: `size` of them from `first` on, a multiple of `size`. Counted in units of the gang."""

    first: int
    size: int

    @property
    def ranks(self) -> range:
        """Their numbers."""
        return range(self.first, self.first + self.size)


@dataclass(frozen=True, eq=False)
class Work:
    """A request as the dealer sees it.

    Attributes:
        id: names it.
        arrived: when it came, in seconds of the clock.
        steps_left: whole steps, at least 1.
        step_s: seconds of a step by degree, for the degrees that it may take; never empty.
        due: when it should be done; None: nobody has said.
        tail_s: seconds after its last step, on one rank.
        priority: the lower, the sooner.
        at: the ranks that it had for its last step; None: it has none.
        stood_since: when its last step ended; `arrived` before the first.
        change_s: what taking other ranks costs.
    """

    id: str
    arrived: float
    steps_left: int
    step_s: Mapping[int, float]
    due: float | None = None
    tail_s: float = 0.0
    priority: int = 0
    at: Block | None = None
    stood_since: float = 0.0
    change_s: float = 0.0

    def left_s(self, degree: int) -> float:
        """Seconds until it is done, at this degree."""
        return self.steps_left * self.step_s[degree] + self.tail_s

    @functools.cached_property
    def degrees(self) -> list[int]:
        """The degrees that pay: a step is shorter than at any smaller one."""
        found: list[int] = []
        for degree in sorted(self.step_s):
            if not found or self.step_s[degree] < self.step_s[found[-1]]:
                found.append(degree)
        return found

    def rises(self, now: float) -> int:
        """Its priority by now."""
        return max(0, self.priority - int((now - self.arrived) / RISE_S))

    def order_s(self, degree: int, now: float) -> float:
        """Its place among those in time: the rank-seconds that are left. Without a deadline its age counts as well."""
        aged = AGING * (now - self.arrived) if self.due is None else 0.0
        return self.left_s(degree) * degree - aged

    def needs(self, now: float) -> int | None:
        """The smallest degree that meets its deadline; None: none does."""
        if self.due is None:
            return self.degrees[0]
        left = self.due - now
        return next((degree for degree in self.degrees if SLACK * self.left_s(degree) <= left), None)


def deal(waiting: Sequence[Work], running: Iterable[Work], units: int, now: float) -> dict[str, Block]:
    """The ranks of what waits, for its next step. What is left out stands still.

    Args:
        waiting: what has no step under way: new, paused, or at a boundary (`at` says with which ranks).
        running: what has one; its ranks (`at`) are not free.
        units: ranks of the gang, a power of two.
        now: the clock.
    """
    running = list(running)
    free = set(range(units)) - {rank for work in running if work.at for rank in work.at.ranks}
    late_running = [work for work in running if work.needs(now) is None]
    needs = {work.id: work.needs(now) for work in waiting}
    in_time = [(work, degree) for work in waiting if (degree := needs[work.id])]
    late = [work for work in waiting if needs[work.id] is None]
    in_time.sort(key=lambda each: (each[0].rises(now), each[0].order_s(each[1], now)))
    late.sort(key=lambda work: (work.rises(now), work.left_s(work.degrees[0]) - AGING * (now - work.arrived)))

    share = max(1, units // LATE_SHARE)
    backlog_s = sum(work.left_s(work.degrees[0]) * work.degrees[0] for work in (*late_running, *late))
    more = min(units, math.ceil(backlog_s / BACKLOG_S))
    hand = _Hand(len(free), sum(work.at.size for work in late_running if work.at))
    if more > share:
        hand.give_late(late, more)
    elif late and now - late[0].stood_since > PATIENCE_S:
        hand.give_late(late[:1], share)
    for level in sorted({work.rises(now) for work in waiting}):  # what is late comes before less urgent work
        for work, degree in in_time:
            if work.rises(now) == level:
                hand.give(work, degree)
        hand.give_late([work for work in late if work.rises(now) == level], share)
    hand.double()
    return _place(hand.given, free)


class _Hand:
    """Free ranks, handed out one request after the other.

    Args:
        free: how many there are.
        late: ranks that late work has already.
    """

    def __init__(self, free: int, late: int) -> None:
        self.given: dict[Work, int] = {}
        self._free, self._late = free, late

    def give(self, work: Work, degree: int) -> None:
        """The ranks for a degree, if so many are free."""
        if work not in self.given and degree <= self._free:
            self.given[work] = degree
            self._free -= degree

    def give_late(self, late: Iterable[Work], most: int) -> None:
        """The smallest degree for each, until late work has `most` ranks; one request may have more."""
        for work in late:
            degree = work.degrees[0]
            if self._late and self._late + degree > most:
                return
            before = self._free
            self.give(work, degree)
            self._late += before - self._free

    def double(self) -> None:
        """Give what is left to those that gain the most seconds a rank, and more than the change costs them."""
        while self._free:
            gains = [(*self._gain(work, degree), work) for work, degree in self.given.items()]
            gain, more, work = max(gains, key=lambda each: each[0], default=(0.0, 0, None))
            if work is None or gain <= 0:
                return
            self._free -= more - self.given[work]
            self.given[work] = more

    def _gain(self, work: Work, degree: int) -> tuple[float, int]:
        """Seconds for each further rank, and the next degree that pays."""
        more = next((each for each in work.degrees if each > degree), 0)
        if not more or more - degree > self._free:
            return 0.0, 0
        keeps = work.at is None or more <= work.at.size
        gain = work.left_s(degree) - work.left_s(more) - (0.0 if keeps else work.change_s)
        return gain / (more - degree), more


def _place(given: Mapping[Work, int], free: set[int]) -> dict[str, Block]:
    """A block for each, the largest first, and who may stay before who comes. Where none is free, a smaller one."""
    free, placed = set(free), {}
    for work, degree in sorted(given.items(), key=lambda each: (-each[1], each[0].at is None)):
        for size in [each for each in reversed(work.degrees) if each <= degree]:
            block = _block(size, free, work.at)
            if block:
                placed[work.id] = block
                free -= set(block.ranks)
                break
    return placed


def _block(size: int, free: set[int], at: Block | None) -> Block | None:
    """A free block: where the request has been, else where it leaves the greatest blocks to others."""
    units = max(free, default=-1) + 1
    blocks = [Block(first, size) for first in range(0, units, size) if free.issuperset(range(first, first + size))]

    def worth(block: Block) -> tuple[bool, int, int]:
        moves = at is None or not set(at.ranks) & set(block.ranks)
        buddy = Block(block.first ^ size, size)
        return moves, len(free.intersection(buddy.ranks)), block.first

    return min(blocks, key=worth, default=None)
