"""One `Turns` for all gateways of a cluster, so that they neither rush to the same gang nor overtake each other.

A single gateway keeps its turns itself. Several gateways ask one actor, the keeper, which the first of them starts. A
gateway that cannot reach the keeper goes on by itself: gangs then refuse some of its requests, which costs time but
loses nothing.

`service.routing` calls this on the event loop that routes; `service.gateway` calls `share`.
"""

import asyncio
import dataclasses
import hashlib
import inspect
import logging
import sys
import time
import uuid
import weakref
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from service.state import exchange, key_use, turns
from service.state.exchange import FORGOTTEN_S, Exchange, Question
from service.state.key_use import KeyUses
from service.state.tickets import Prospect, Ticket, Turn
from service.state.turns import Turns
from workers.gang import stats
from workers.gang.stats import GangBacklog

logger = logging.getLogger("ray.serve")

BEAT_S = 1.0
"""Seconds between two messages of a gateway to the keeper: that it lives, and which gangs it knows."""

SILENT_S = 3.0
"""Seconds of silence after which a gateway, or the keeper, counts as gone."""

UNUSED_S = 600.0
"""Seconds without a question after which the keeper ends: nothing else would end it."""

WAITING = 100_000
"""Requests that may wait in the keeper at once; each is an open call."""

NAMESPACE = "spray"

HEAD = "node:__internal_head__"
"""The resource by which Ray marks the head's node."""

_several = False


def share(several: bool) -> None:
    """Say whether there are other gateways."""
    global _several
    _several = several


class Keeper(Exchange, KeyUses):
    """The actor. All its methods run on one event loop. It also passes on the questions of gateways."""

    def __init__(self) -> None:
        super().__init__()
        self._turns: dict[str, Turns] = {}
        self._heard: dict[tuple[str, str], float] = {}  # by application and asker: when
        self._watching: asyncio.Task[None] | None = None

    async def take(self, application: str, ticket: Ticket) -> Turn:
        """See `Turns.take`."""
        return await self._of(application).take(ticket)

    async def leave(self, application: str, request_id: str) -> None:
        """See `Turns.leave`."""
        self._of(application).leave(request_id)

    async def end(self, application: str, turn: Turn, refused: bool) -> None:
        """See `Turns.end`."""
        self._of(application).end(turn, refused)

    async def lose(self, application: str, request_id: str) -> None:
        """See `Turns.lose`."""
        self._of(application).lose(request_id)

    async def prospect(self, application: str, caller: str) -> Prospect:
        """See `Turns.prospect`."""
        return self._of(application).prospect(caller)

    async def standing(self, application: str, request_id: str) -> Prospect | None:
        """See `Turns.standing`."""
        return self._of(application).standing(request_id)

    async def attend(self, gateway: str) -> list[tuple[int, Question]]:
        """See `Exchange.attend`."""
        self._watching = self._watching or asyncio.create_task(self._watch())
        return await super().attend(gateway)

    async def beat(self, application: str, asker: str, reports: Mapping[str, GangBacklog]) -> None:
        """Note that a gateway lives; see `Turns.know`."""
        self._watching = self._watching or asyncio.create_task(self._watch())
        self._heard[application, asker] = time.monotonic()
        self._of(application).know(asker, reports)

    def _of(self, application: str) -> Turns:
        return self._turns.setdefault(application, Turns())

    async def _watch(self) -> None:
        """Forget silent gateways, and end when all are silent."""
        heard_at = time.monotonic()
        while True:
            await asyncio.sleep(BEAT_S)
            now = time.monotonic()
            for application, asker in [key for key, at in self._heard.items() if now - at > SILENT_S]:
                del self._heard[application, asker]
                self._of(application).forget(asker)
            if self._heard or now - self.attended_at < FORGOTTEN_S:
                heard_at = now
            elif now - heard_at > UNUSED_S:
                ray.actor.exit_actor()  # type: ignore[no-untyped-call]


def start_keeper() -> Any:
    """The keeper of the cluster, started if necessary. Gateways of another version have a keeper of their own."""
    # Whole modules: to find a class in one, Python parses it, which fails in two threads at once (CPython 3.11).
    source = "".join(inspect.getsource(module) for module in (turns, exchange, key_use, sys.modules[__name__], stats))
    made = ray.remote(Keeper).options(
        name=f"turns-{hashlib.sha256(source.encode()).hexdigest()[:12]}",
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",  # else it would end with the gateway that started it
        max_restarts=-1,
        num_cpus=0,
        resources={HEAD: 0.001},  # on whichever node is the head: the autoscaler removes no node with an actor
        max_concurrency=WAITING,
    )
    return made.remote()


class SharedTurns:
    """The turns of a router: its own `Turns`, or the keeper's if there are several gateways.

    Args:
        application: the application of the gangs.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._asker = uuid.uuid4().hex
        self._own = Turns()
        self._reports: Mapping[str, GangBacklog] = {}
        self._keeper: Any = None  # while it answers
        self._away = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None
        self._shared: set[Turn] = set()  # those that the keeper gave
        self._unsent: dict[Turn, bool] = {}  # of these, those that ended while it was away, and whether refused

    async def take(self, ticket: Ticket) -> Turn:
        """See `Turns.take`."""
        ticket = dataclasses.replace(ticket, asker=self._asker)
        if _several and self._keeper is not None:
            turn = await self._ask(self._keeper, ticket)
            if turn is not None:
                self._shared.add(turn)
                return turn
        return await self._own.take(ticket)

    def end(self, turn: Turn, refused: bool = False) -> None:
        """See `Turns.end`."""
        if turn not in self._shared:
            self._own.end(turn, refused)
            return
        self._shared.discard(turn)
        if self._keeper is not None:
            self._keeper.end.remote(self._application, turn, refused)
        else:  # it may only be slow, and would keep the turn for good: the gang is hardly ever seen idle
            self._unsent[turn] = refused

    def lose(self, request_id: str) -> None:
        """See `Turns.lose`."""
        self._own.lose(request_id)
        if self._keeper is not None:
            self._keeper.lose.remote(self._application, request_id)

    async def prospect(self, caller: str) -> Prospect:
        """See `Turns.prospect`."""
        asked: Prospect | None = await self._look("prospect", caller)
        return asked or self._own.prospect(caller)

    async def standing(self, request_id: str) -> Prospect | None:
        """See `Turns.standing`."""
        asked: Prospect | None = await self._look("standing", request_id)
        return asked or self._own.standing(request_id)

    def know(self, reports: Mapping[str, GangBacklog]) -> None:
        """See `Turns.know`. The keeper hears at once of gangs that come, go or lose their ranks; else with the beat."""
        news = _notable(reports) != _notable(self._reports)
        self._reports = reports
        self._own.know(self._asker, reports)
        if self._keeper is not None:
            if news:
                self._keeper.beat.remote(self._application, self._asker, reports)
        elif _several and (self._beating is None or self._beating.done()):
            self._beating = asyncio.create_task(_beat(weakref.ref(self)))

    async def _ask(self, keeper: Any, ticket: Ticket) -> Turn | None:
        """A turn from the keeper; None if it is away before the request has one."""
        asked = asyncio.ensure_future(_result(keeper.take.remote(self._application, ticket)))
        away = asyncio.ensure_future(self._away.wait())
        turn: Turn | None = None
        try:
            await asyncio.wait({asked, away}, return_when=asyncio.FIRST_COMPLETED)
            turn = asked.result() if asked.done() else None
            return turn
        except RayError as error:
            self._lose_keeper(error)
            return None
        finally:
            away.cancel()
            if turn is None:  # also if it came together with a cancellation
                asked.cancel()
                keeper.leave.remote(self._application, ticket.request_id)

    async def _look(self, method: str, of: str) -> Any:
        """The keeper's answer; None if there is no keeper, or it is away."""
        if not _several or self._keeper is None:
            return None
        try:
            asked = getattr(self._keeper, method).remote(self._application, of)
            return await asyncio.wait_for(_result(asked), SILENT_S)
        except (RayError, TimeoutError) as error:
            self._lose_keeper(error)
            return None

    async def _beat_once(self) -> None:
        """Tell the keeper that this gateway lives; notice if the keeper is away."""
        try:
            found = self._keeper or await asyncio.to_thread(start_keeper)
            beat = found.beat.remote(self._application, self._asker, self._reports)
            await asyncio.wait_for(_result(beat), SILENT_S)
            self._keeper = found
            self._away.clear()
            while self._unsent:
                found.end.remote(self._application, *self._unsent.popitem())
        except (RayError, TimeoutError, ValueError) as error:
            self._lose_keeper(error)

    def _go_alone(self) -> None:
        """Note that there are no other gateways anymore."""
        self._keeper = None
        self._away.set()

    def _lose_keeper(self, error: Exception) -> None:
        if self._keeper is not None:
            logger.warning("%s: this gateway takes turns by itself: %s", self._application, error)
        self._keeper = None
        self._away.set()


def _notable(reports: Mapping[str, GangBacklog]) -> dict[str, bool]:
    return {gang: report.replacing for gang, report in reports.items()}


async def _beat(turns: "weakref.ref[SharedTurns]") -> None:
    """Beat every second. It ends with its router, since nothing else says when a model was removed."""
    while _several:
        if (beating := turns()) is None:
            return
        await beating._beat_once()
        del beating
        await asyncio.sleep(BEAT_S)
    if (beating := turns()) is not None:
        beating._go_alone()


async def _result(reference: Any) -> Any:
    return await reference
