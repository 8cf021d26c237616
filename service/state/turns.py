"""Whose turn it is: the requests that wait for one model's gangs, and the free gang that each gets.

`service.routing` enters a request, is told a gang, and says when the request has ended. `Turns` knows nothing of Ray.
If there are several gateways, all use the same one, through `service.state.shared_turns`.

*Order.* Callers share the gangs by cost. Within a caller, the first admitted is served first. This is start-time fair
queueing (Goyal, Vin and Cheng, 1996): a request's tag is where its caller's work ends so far, at least the tag that was
served last, and the least tag is next. So a caller with a thousand requests delays another caller by one turn, not by a
thousand. A request that lost its gang keeps its tag.

*Gang.* The free gang with the least backlog in seconds; among equals, a warm one. A gang that is replacing its ranks
gets nothing while others run. `service.state.gang_state` holds what is known of each.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from service.state import gang_state
from service.state.gang_state import GangState, Given, best
from service.state.tickets import Prospect, Ticket, Turn
from workers.gang.stats import GangBacklog

OVERDUE_S = 3.0
"""Seconds after which a gang with a turn that reports itself idle never got the request, or has finished it."""

REMEMBERED = 1000
"""Tags of ended requests that are kept, in case they come back because their gang was lost."""


class Waiter(NamedTuple):
    """A request in the queue. `again`: it was there before, and keeps its tag."""

    tag: float
    ticket: Ticket
    answer: "asyncio.Future[Turn]"
    again: bool = False


class Turns:
    """The turns of one model. All its methods are called on one event loop."""

    def __init__(self) -> None:
        self._gangs: dict[str, GangState] = {}
        self._waiting: dict[str, Waiter] = {}  # by request
        self._ends: dict[str, float] = {}  # by caller: where its work ends, in units of cost
        self._tags: dict[str, float] = {}  # by request: also of those that have ended lately
        self._served = 0.0  # the tag that was served last
        self._numbers = itertools.count(time.time_ns())  # so that those of a former keeper are no one's
        self._timer: asyncio.TimerHandle | None = None  # a gang that refused does not say when it is free again

    def __len__(self) -> int:
        return len(self._waiting)

    async def take(self, ticket: Ticket) -> Turn:
        """Wait for the request's turn. Canceling this call takes the request out of the queue."""
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
        """Take out a request that has left, while it waited or just as its turn came."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            waiting.answer.cancel()
            return
        for state in self._gangs.values():
            for number in [number for number, given in state.turns.items() if given.ticket.request_id == request_id]:
                del state.turns[number]
                state.freed_at = time.monotonic()
        self._give()

    def end(self, turn: Turn, refused: bool = False) -> None:
        """End a turn: its request has ended for any reason. `refused`: the gang was busy or gone, and it asks again."""
        state = self._gangs.get(turn.gang)
        if state is None or state.turns.pop(turn.number, None) is None:
            return
        if refused:
            state.refused_at = time.monotonic()
        else:
            state.freed_at = time.monotonic()
        self._give()

    def lose(self, request_id: str) -> None:
        """Note that the request has lost the ranks of its gang. The gang's own report comes a second later."""
        for state in self._gangs.values():
            holds = [state.latest, *(given.ticket for given in state.turns.values())]
            if any(ticket is not None and ticket.request_id == request_id for ticket in holds):
                state.lost_at = time.monotonic()

    def know(self, asker: str, reports: Mapping[str, GangBacklog]) -> None:
        """Take the gangs that a gateway can reach, with the last report of each."""
        for name, report in reports.items():
            state = self._gangs.setdefault(name, GangState())
            state.hear(asker, report)
            idle = not state.report.busy and not state.report.replacing
            given_at = max((given.at for given in state.turns.values()), default=math.inf)
            if idle and state.reported_at > given_at + OVERDUE_S:
                state.turns.clear()
                state.freed_at = time.monotonic()
        for name in [name for name in self._gangs if name not in reports]:
            self._gangs[name].askers.pop(asker, None)
            if not self._gangs[name].askers:
                del self._gangs[name]
        self._give()

    def forget(self, asker: str) -> None:
        """Forget a gateway that is gone, with its requests."""
        for waiter in [waiter for waiter in self._waiting.values() if waiter.ticket.asker == asker]:
            del self._waiting[waiter.ticket.request_id]
            waiter.answer.cancel()
        for state in self._gangs.values():
            for number in [number for number, given in state.turns.items() if given.ticket.asker == asker]:
                del state.turns[number]  # the gang ends the request itself; until then it refuses
        self.know(asker, {})

    def prospect(self, caller: str) -> Prospect:
        """What a new request of this caller would wait for."""
        tag = max(self._served, self._ends.get(caller, 0.0))
        return self._expect([waiter.ticket for waiter in self._waiting.values() if waiter.tag <= tag])

    def _expect(self, ahead: Sequence[Ticket]) -> Prospect:
        """The wait of a request behind these. An elastic gang is free again when one of its requests ends."""
        now = time.monotonic()
        if not ahead and self._free(now):
            return Prospect(0, 0.0)
        learned = [state.report.request_s for state in self._gangs.values() if state.report.request_s]
        request_s = sum(learned) / len(learned) if learned else 0.0
        running_s = sum(held.remaining_s(now, request_s) / held.report.slots for held in self._gangs.values())
        waiting_s = sum(ticket.seconds or request_s for ticket in ahead)
        return Prospect(len(ahead), (waiting_s + running_s) / max(1, len(self._gangs)))

    def standing(self, request_id: str) -> Prospect | None:
        """What a waiting request still waits for; None if it does not wait."""
        own = self._waiting.get(request_id)
        if own is None:
            return None
        place = own.tag, own.ticket.place
        others = self._waiting.values()
        return self._expect([other.ticket for other in others if (other.tag, other.ticket.place) < place])

    def _tag(self, ticket: Ticket) -> float:
        """The place of the request in the common order."""
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
        """Let a request pass those of its caller that were admitted later but came first, through a faster gateway."""
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
        now = time.monotonic()
        while self._waiting:
            free = self._free(now)
            if not free:
                break
            tag, ticket, answer, _ = min(self._waiting.values(), key=lambda waiter: (waiter.tag, waiter.ticket.place))
            del self._waiting[ticket.request_id]
            if answer.done():  # canceled
                continue
            state = self._gangs[gang := self._choose(free, ticket, now)]
            number = next(self._numbers)
            state.turns[number], state.latest = Given(ticket, now), ticket
            self._served = max(self._served, tag)
            answer.set_result(Turn(number, gang))
        if not self._waiting and not any(state.turns for state in self._gangs.values()):  # all are even
            self._served = max([self._served, *self._ends.values()])
            self._ends.clear()
        refused = any(not state.full and state.pauses(now) for state in self._gangs.values())
        if self._waiting and refused and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(gang_state.REFUSED_S, self._again)

    def _again(self) -> None:
        self._timer = None
        self._give()

    def _free(self, now: float) -> list[str]:
        """The gangs that may get a request. If all have lost their ranks, it waits at one where new ranks start."""
        all_lost = all(state.lost for state in self._gangs.values())
        return [
            name
            for name, state in self._gangs.items()
            if not state.full and not state.pauses(now) and (all_lost or not state.lost)
        ]

    def _choose(self, free: Sequence[str], ticket: Ticket, now: float) -> str:
        backlogs = {name: self._gangs[name].remaining_s(now, 0.0) for name in free}
        warm = frozenset(name for name in free if ticket.shape in self._gangs[name].report.shapes)
        return best(random.sample(free, len(free)), backlogs, warm)
