"""Dealer: which ranks each request of an elastic gang has for its next step.

Comes in: what waits, what runs, what a step takes at each degree, and the clock. Goes out: blocks of ranks. A pure
function of the standard library, called at every boundary by `workers.gang.elastic`, and by the simulation of
`tests.benchmarks.elastic`: what is simulated is what ships.

Priorities decide, then deadlines, then the least work:

1. Work that can still meet its deadline, the cheapest in rank-seconds first, each at the smallest degree that does it.
   If others hold ranks that it needs, these are held for it: no request that comes after it begins a step there that
   would last longer. So several requests make room for one, each at its own boundary.
2. Work that is late anyway, on few ranks: it may not make others late. It gets more ranks the more of it there is, and
   its order is by what is left and by age, so that nobody waits without bound.
3. Ranks that are left double a request, as long as one gains by it. Then they are for all work that is late, unless
   something in time waits for more.

Degrees are powers of two and blocks are aligned, so that every block has groups that were made at the start. Scheduling
by steps follows TetriServe (arXiv 2510.01565) and GenServe (arXiv 2604.04335).
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
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
        steps_left: steps, at least 1 unless it is asked for a time in the middle of one.
        step_s: seconds of a step by degree, for the degrees that it may take; never empty.
        due: when it should be done; None: nobody has said.
        tail_s: seconds after its last step, on one rank.
        priority: the lower, the sooner.
        at: the ranks that it had for its last step; None: it has none.
        stood_since: when its last step ended, or the first of its ranks' steps began; `arrived` before that.
        change_s: what taking other ranks costs.
    """

    id: str
    arrived: float
    steps_left: float
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

    @property
    def unit_s(self) -> float:
        """Seconds of ranks that are left at the smallest degree."""
        return self.left_s(self.degrees[0]) * self.degrees[0]

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


def deal(
    waiting: Sequence[Work], running: Iterable[Work], units: int, now: float, lost: Set[int] = frozenset()
) -> dict[str, Block]:
    """The ranks of what waits, for its next step. What is left out stands still.

    Args:
        waiting: what has no step under way: new, paused, or at a boundary (`at` says with which ranks).
        running: what has one; its ranks (`at`) are not free.
        units: ranks of the gang, a power of two.
        now: the clock.
        lost: ranks that nobody can have. A `step_s` has only degrees for which some block is without them.
    """
    running = list(running)
    free = set(range(units)) - lost - {rank for work in running if work.at for rank in work.at.ranks}
    late_running = [work for work in running if work.needs(now) is None]
    needs = {work.id: work.needs(now) for work in waiting}
    in_time = [(work, degree) for work in waiting if (degree := needs[work.id])]
    late = [work for work in waiting if needs[work.id] is None]
    in_time.sort(key=lambda each: order(each[0], now))
    late.sort(key=lambda work: order(work, now))

    share = max(1, units // LATE_SHARE)
    backlog_s = sum(work.unit_s for work in (*late_running, *late))
    more = min(units, math.ceil(backlog_s / BACKLOG_S))
    hand = _Hand(len(free), sum(work.at.size for work in late_running if work.at))
    holds = _Holds(units, free, running, now, lost)
    if more > share:
        hand.give_late(late, more)
    elif late and now - late[0].stood_since > PATIENCE_S:
        hand.give_late(late[:1], share)
    for level in sorted({work.rises(now) for work in waiting}):  # what is late comes before less urgent work
        for work, degree in in_time:
            if work.rises(now) != level or work in hand.given:
                continue
            if degree > hand.free or not holds.has_free(degree):
                held = holds.hold(work, hand.given)
                hand.free -= len(free.intersection(held.ranks)) if held else 0
                if held:
                    continue
            hand.give(work, degree)
        hand.give_late([work for work in late if work.rises(now) == level], share)
    hand.double()
    if not holds.ranks and all(work in hand.given for work, _ in in_time):
        hand.give_late(late, units)  # what is left helps nobody in time
        hand.double()
    placed = _place(hand.given, free - holds.ranks)
    if any(work.id not in placed or placed[work.id].size < (needs[work.id] or 1) for work in hand.given):
        return _place(hand.given, free)  # beside what is held there was no block for one that comes first
    ordered = [*(work for work, _ in in_time), *late]
    return placed | holds.lend([work for work in ordered if work.id not in placed], free)


def order(work: Work, now: float) -> tuple[int, bool, float]:
    """The place of a request among all, the least first; that of a running one as if it were at a boundary."""
    degree = work.needs(now)
    if degree is None:
        return work.rises(now), True, work.left_s(work.degrees[0]) - AGING * (now - work.arrived)
    return work.rises(now), False, work.order_s(degree, now)


class _Hand:
    """Free ranks, handed out one request after the other.

    Args:
        free: how many there are.
        late: ranks that late work has already.

    Attributes:
        given: how many each has got.
        free: how many are left.
    """

    def __init__(self, free: int, late: int) -> None:
        self.given: dict[Work, int] = {}
        self.free, self._late = free, late

    def give(self, work: Work, degree: int) -> None:
        """The ranks for a degree, if so many are free."""
        if work not in self.given and degree <= self.free:
            self.given[work] = degree
            self.free -= degree

    def give_late(self, late: Iterable[Work], most: int) -> None:
        """The smallest degree for each, until late work has `most` ranks; one request may have more."""
        for work in late:
            degree = work.degrees[0]
            if self._late and self._late + degree > most:
                return
            before = self.free
            self.give(work, degree)
            self._late += before - self.free

    def double(self) -> None:
        """Give what is left to those that gain the most seconds a rank, and more than the change costs them."""
        while self.free:
            gains = [(*self._gain(work, degree), work) for work, degree in self.given.items()]
            gain, more, work = max(gains, key=lambda each: each[0], default=(0.0, 0, None))
            if work is None or gain <= 0:
                return
            self.free -= more - self.given[work]
            self.given[work] = more

    def _gain(self, work: Work, degree: int) -> tuple[float, int]:
        """Seconds for each further rank, and the next degree that pays."""
        more = next((each for each in work.degrees if each > degree), 0)
        if not more or more - degree > self.free:
            return 0.0, 0
        keeps = work.at is None or more <= work.at.size
        gain = work.left_s(degree) - work.left_s(more) - (0.0 if keeps else work.change_s)
        return gain / (more - degree), more


class _Holds:
    """Blocks that are held for requests, until those that run there have ended their steps.

    Args:
        units: ranks of the gang.
        free: those that nobody has.
        running: what has the others.
        now: the clock.
        lost: ranks that nobody can have.

    Attributes:
        ranks: of all blocks that are held, free and not.
    """

    def __init__(self, units: int, free: set[int], running: Iterable[Work], now: float, lost: Set[int]) -> None:
        self.ranks: set[int] = set()
        self._lost = lost
        self._units, self._free, self._now = units, free, now
        self._runs = {rank: work for work in running if work.at for rank in work.at.ranks}
        self._blocks: list[tuple[Block, float]] = []

    def has_free(self, degree: int) -> bool:
        """Whether some block of this size is free and not held."""
        return _block(degree, self._free - self.ranks, None) is not None

    def hold(self, work: Work, given: Mapping[Work, int]) -> Block | None:
        """Hold the block that is free soonest for a request, at the smallest degree at which it then is in time.

        Those that run there must come after it. `given`: what others have got before it, which must fit beside the
        block. None: there is no such block, or the request has no deadline.
        """
        if work.due is None:
            return None
        others = _place(given, self._free - self.ranks)
        taken = self.ranks.union(self._lost, *(block.ranks for block in others.values()))
        for degree in work.degrees:
            blocks = [Block(first, degree) for first in range(0, self._units - degree + 1, degree)]
            fit = [(self._wait_s(block, work), block) for block in blocks if taken.isdisjoint(block.ranks)]
            wait_s, block = min(fit, default=(math.inf, Block(0, degree)))
            if self._now + wait_s + SLACK * work.left_s(degree) <= work.due:
                self.ranks.update(block.ranks)
                self._blocks.append((block, wait_s))
                return block
        return None

    def lend(self, waiting: Iterable[Work], free: set[int]) -> dict[str, Block]:
        """Free ranks of held blocks, for a step that ends before the block is free."""
        lent: dict[str, Block] = {}
        idle = [(wait_s, free.intersection(block.ranks)) for block, wait_s in self._blocks]
        for work in waiting:
            for wait_s, ranks in idle:
                degree = work.degrees[0]
                block = _block(degree, ranks, work.at)
                moves = work.at is not None and work.at != block
                if block and work.step_s[degree] + (work.change_s if moves else 0.0) <= wait_s:
                    lent[work.id] = block
                    ranks -= set(block.ranks)
                    break
        return lent

    def _wait_s(self, block: Block, work: Work) -> float:
        """Seconds until all of a block is free; infinite if one that runs there comes before this request."""
        there = {self._runs[rank] for rank in block.ranks if rank in self._runs}
        if any(order(each, self._now) < order(work, self._now) for each in there):
            return math.inf
        ends = (each.stood_since + each.step_s[each.at.size] for each in there if each.at)
        return max(0.0, max(ends, default=self._now) - self._now)


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
