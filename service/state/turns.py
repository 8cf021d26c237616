"""Whose turn it is: the requests that wait for one model's gangs, and the free gang that each gets.

`service.routing` enters a request and is told a gang; it says when the request has ended. `Turns` knows nothing of Ray.
With several gateways all of them ask the same one, through `service.state.shared_turns`.

*Order.* Callers share the gangs by cost, first admitted, first served within a caller: start-time fair queueing (Goyal,
Vin and Cheng, 1996). A request's tag is where its caller's work ends so far, at least the tag that was served last; the
least tag is next. So a caller with a thousand requests delays another's by one turn, not by a thousand. A request that
lost its gang keeps its tag.

*Gang.* The free one with the least backlog in seconds; among equals, a warm one. A gang that replaces its ranks gets
nothing while others run. The gang has the last word: it takes one request at a time, an elastic one several, and
refuses more. What is believed here may therefore be wrong without harm: it costs a refusal, and a pause.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from workers.gang.stats import GangBacklog

COMPARABLE_S = 2.0
"""Backlogs that differ by at most this count as equal: a cold shape costs about as much."""

REFUSED_S = 0.1
"""A gang that has refused a request is not asked again so soon."""

MOST_REFUSED_S = 1.0
"""The same for one that reports work; its report is up to this old."""

OVERDUE_S = 3.0
"""A gang that still reports itself idle this long after it was given a request has not got it, or has finished it."""

REMEMBERED = 1000
"""Tags of ended requests that are kept, should these come back because their gang was lost."""

Shape = tuple[int, int, int]
GangId = TypeVar("GangId")


@dataclass(frozen=True)
class Ticket:
    """A request that wants a turn.

    Attributes:
        request_id: of the request.
        caller: who shares with other callers.
        cost: of the request, in any unit that all requests of the model have in common.
        place: when it was admitted, in seconds since the epoch, by the clock of its gateway.
        shape: width, height and frames, for gangs that are warm.
        asker: the gateway that waits; what it holds is taken back when it is gone.
        seconds: of a whole gang that it will cost; 0: as much as a typical one.
    """

    request_id: str
    caller: str
    cost: float
    place: float
    shape: Shape
    asker: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Turn:
    """A gang, given to a request until `Turns.end`."""

    number: int
    gang: str


class Prospect(NamedTuple):
    """What a request has to wait for, as far as is known.

    Attributes:
        ahead: requests that are served before it.
        wait_s: seconds until its turn; 0 also while nobody knows what a request costs.
    """

    ahead: int
    wait_s: float


class Takes(NamedTuple):
    """What a request would take on a gang.

    Attributes:
        seconds: as an estimate; 0: nobody knows.
        least_s: at the very least; 0: nobody knows.
    """

    seconds: float
    least_s: float


class Waiter(NamedTuple):
    """A request in the queue; `again`: it was there before, and keeps its tag."""

    tag: float
    ticket: Ticket
    answer: "asyncio.Future[Turn]"
    again: bool = False


class Given(NamedTuple):
    """A turn that has not ended: whose, and since when, in seconds since the epoch."""

    ticket: Ticket
    at: float


@dataclass
class Holding:
    """What is known of a gang beyond its report.

    Attributes:
        report: the last one.
        askers: the gateways that know the gang.
        turns: those that have it, by number; an elastic gang takes several requests at once.
        latest: the request that it was given last.
        freed_at: when it last became free, in seconds since the epoch.
        refused_at: when it last refused a request, in seconds since the epoch.
        lost_at: when a request lost its ranks there, in seconds since the epoch.
    """

    report: GangBacklog = field(default_factory=GangBacklog)
    askers: set[str] = field(default_factory=set)
    turns: dict[int, Given] = field(default_factory=dict)
    latest: Ticket | None = None
    freed_at: float = 0.0
    refused_at: float = 0.0
    lost_at: float = 0.0

    @property
    def full(self) -> bool:
        """It takes no further request."""
        return len(self.turns) >= self.report.slots

    @property
    def lost(self) -> bool:
        """It replaces its ranks."""
        return self.report.replacing or self.lost_at > self.report.reported_at

    def backlog_s(self, now: float) -> float:
        """Seconds until it is free of work that was not given from here, or is not known to have ended."""
        if self.freed_at >= self.report.reported_at and not self.turns:
            return 0.0
        return max(0.0, self.report.backlog_s - (now - self.report.reported_at))

    def pauses(self, now: float) -> bool:
        """It has refused a request lately, and is not asked again so soon; the later, the more work it reports."""
        return now - self.refused_at < max(REFUSED_S, min(MOST_REFUSED_S, self.backlog_s(now)))

    def remaining_s(self, now: float, request_s: float) -> float:
        """Seconds left of what it runs. `request_s`: what a request takes, for one that it has not reported yet."""
        fresh = [
            given for given in self.turns.values() if not (self.report.busy and self.report.reported_at > given.at)
        ]
        fresh_s = sum(max(0.0, (ticket.seconds or request_s) - (now - at)) for ticket, at in fresh)
        return fresh_s if fresh and len(fresh) == len(self.turns) else fresh_s + self.backlog_s(now)


class Turns:
    """The turns of one model. All its methods are called on one event loop."""

    def __init__(self) -> None:
        self._gangs: dict[str, Holding] = {}
        self._waiting: dict[str, Waiter] = {}  # by request
        self._ends: dict[str, float] = {}  # by caller: where its work ends, in units of cost
        self._tags: dict[str, float] = {}  # by request: also of those that have ended lately
        self._served = 0.0  # the tag that was served last
        self._numbers = itertools.count(time.time_ns())  # so that those of a former keeper are no one's
        self._timer: asyncio.TimerHandle | None = None  # a gang that refused does not say when it is free again

    def __len__(self) -> int:
        return len(self._waiting)

    async def take(self, ticket: Ticket) -> Turn:
        """Wait for the request's turn. If this call is canceled, the request has left."""
        answer: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        again = ticket.request_id in self._tags
        self._waiting[ticket.request_id] = Waiter(self._tag(ticket), ticket, answer, again)
        if not again:
            self._line_up(ticket)
        self._give()
        try:
            return await answer
        except asyncio.CancelledError:  # not `leave`: by now another call may wait for the same request
            waiter = self._waiting.get(ticket.request_id)
            if waiter is not None and waiter.answer is answer:
                del self._waiting[ticket.request_id]
            elif answer.done() and not answer.cancelled():  # its turn came just now
                self.end(answer.result())
            raise

    def leave(self, request_id: str) -> None:
        """The request has left, while it waited or just as its turn came."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            waiting.answer.cancel()
            return
        for holding in self._gangs.values():
            for number in [number for number, given in holding.turns.items() if given.ticket.request_id == request_id]:
                del holding.turns[number]
                holding.freed_at = time.time()
        self._give()

    def end(self, turn: Turn, refused: bool = False) -> None:
        """The request of a turn has ended for any reason; or its gang was busy or gone, and it asks again."""
        holding = self._gangs.get(turn.gang)
        if holding is None or holding.turns.pop(turn.number, None) is None:
            return
        if refused:
            holding.refused_at = time.time()
        else:
            holding.freed_at = time.time()
        self._give()

    def lose(self, request_id: str) -> None:
        """The request has lost the ranks of its gang. The gang's own report comes a second later."""
        for holding in self._gangs.values():
            holds = [holding.latest, *(given.ticket for given in holding.turns.values())]
            if any(ticket is not None and ticket.request_id == request_id for ticket in holds):
                holding.lost_at = time.time()

    def know(self, asker: str, reports: Mapping[str, GangBacklog]) -> None:
        """A gateway says which gangs it can reach, with the last report of each."""
        for name, report in reports.items():
            holding = self._gangs.setdefault(name, Holding())
            holding.askers.add(asker)
            if report.reported_at >= holding.report.reported_at:
                holding.report = report
            idle = not report.busy and not report.replacing
            given_at = max((given.at for given in holding.turns.values()), default=math.inf)
            if idle and report.reported_at > given_at + OVERDUE_S:
                holding.turns.clear()
                holding.freed_at = time.time()
        for name in [name for name in self._gangs if name not in reports]:
            self._gangs[name].askers.discard(asker)
            if not self._gangs[name].askers:
                del self._gangs[name]
        self._give()

    def forget(self, asker: str) -> None:
        """A gateway is gone, and with it its requests."""
        for waiter in [waiter for waiter in self._waiting.values() if waiter.ticket.asker == asker]:
            del self._waiting[waiter.ticket.request_id]
            waiter.answer.cancel()
        for holding in self._gangs.values():
            for number in [number for number, given in holding.turns.items() if given.ticket.asker == asker]:
                del holding.turns[number]  # the gang ends the request itself; until then it refuses
        self.know(asker, {})

    def prospect(self, caller: str) -> Prospect:
        """What a new request of this caller would have to wait for."""
        tag = max(self._served, self._ends.get(caller, 0.0))
        return self._expect([waiter.ticket for waiter in self._waiting.values() if waiter.tag <= tag])

    def _expect(self, ahead: Sequence[Ticket]) -> Prospect:
        """When whoever comes after these waiting requests gets a gang, an elastic one when one of its requests ends."""
        now = time.time()
        if not ahead and self._free(now):
            return Prospect(0, 0.0)
        learned = [holding.report.request_s for holding in self._gangs.values() if holding.report.request_s]
        request_s = sum(learned) / len(learned) if learned else 0.0
        running_s = sum(held.remaining_s(now, request_s) / held.report.slots for held in self._gangs.values())
        waiting_s = sum(ticket.seconds or request_s for ticket in ahead)
        return Prospect(len(ahead), (waiting_s + running_s) / max(1, len(self._gangs)))

    def standing(self, request_id: str) -> Prospect | None:
        """What a request that waits still has to wait for; None if it does not wait."""
        own = self._waiting.get(request_id)
        if own is None:
            return None
        place = own.tag, own.ticket.place
        others = self._waiting.values()
        return self._expect([other.ticket for other in others if (other.tag, other.ticket.place) < place])

    def _tag(self, ticket: Ticket) -> float:
        """Where in the common order the request comes."""
        tag = self._tags.pop(ticket.request_id, None)
        if tag is None:
            tag = max(self._served, self._ends.get(ticket.caller, 0.0))
            self._ends[ticket.caller] = tag + ticket.cost
        self._tags[ticket.request_id] = tag
        if len(self._tags) > REMEMBERED + len(self._waiting):
            kept = {*self._waiting, ticket.request_id}
            del self._tags[next(name for name in self._tags if name not in kept)]
        return tag

    def _line_up(self, ticket: Ticket) -> None:
        """Let a request pass those of its caller that were admitted later and were here first, by a faster gateway."""
        later = [
            waiter
            for waiter in self._waiting.values()
            if waiter.ticket.caller == ticket.caller and waiter.ticket.place > ticket.place and not waiter.again
        ]
        if later:
            later.sort(key=lambda waiter: waiter.tag)
            tag = later[0].tag
            for waiter in (self._waiting[ticket.request_id], *later):
                name = waiter.ticket.request_id
                self._waiting[name] = waiter._replace(tag=tag)
                self._tags[name] = tag
                tag += waiter.ticket.cost

    def _give(self) -> None:
        """Give free gangs to the requests that are next."""
        now = time.time()
        while self._waiting:
            free = self._free(now)
            if not free:
                break
            tag, ticket, answer, _ = min(self._waiting.values(), key=lambda waiter: (waiter.tag, waiter.ticket.place))
            del self._waiting[ticket.request_id]
            if answer.done():  # canceled
                continue
            holding = self._gangs[gang := self._choose(free, ticket, now)]
            number = next(self._numbers)
            holding.turns[number], holding.latest = Given(ticket, now), ticket
            self._served = max(self._served, tag)
            answer.set_result(Turn(number, gang))
        if not self._waiting and not any(holding.turns for holding in self._gangs.values()):  # all are even
            self._served = max([self._served, *self._ends.values()])
            self._ends.clear()
        refused = any(not holding.full and holding.pauses(now) for holding in self._gangs.values())
        if self._waiting and refused and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(REFUSED_S, self._again)

    def _again(self) -> None:
        self._timer = None
        self._give()

    def _free(self, now: float) -> list[str]:
        """The gangs that may be given a request. If all have lost their ranks, it waits where new ones start."""
        all_lost = all(holding.lost for holding in self._gangs.values())
        return [
            name
            for name, holding in self._gangs.items()
            if not holding.full and not holding.pauses(now) and (all_lost or not holding.lost)
        ]

    def _choose(self, free: Sequence[str], ticket: Ticket, now: float) -> str:
        backlogs = {name: self._gangs[name].remaining_s(now, 0.0) for name in free}
        warm = frozenset(name for name in free if ticket.shape in self._gangs[name].report.shapes)
        return best(random.sample(free, len(free)), backlogs, warm)


def best(gangs: Sequence[GangId], backlogs: Mapping[GangId, float], warm: frozenset[GangId]) -> GangId:
    """The gang for a request: a warm one of those within `COMPARABLE_S` of the least backlog, if there is one.

    Equals keep their order: shuffle them first, so that two gateways do not rush to the same one.

    Args:
        gangs: those that may be asked; at least one.
        backlogs: seconds until each is free.
        warm: those that have run the request's shape.
    """
    least_s = min(backlogs[gang] for gang in gangs)
    comparable = [gang for gang in gangs if backlogs[gang] <= least_s + COMPARABLE_S]
    return min(comparable, key=lambda gang: (gang not in warm, backlogs[gang]))
