"""Questions that one gateway asks all others, such as which requests they have. For `service.gateway`.

A question comes in with the name of the gateway that asks; the answers of the others go out, and the names of those
that did not answer in time. The keeper of `service.state.shared_turns` passes both on: every gateway keeps a call to it
open, which returns with questions, so no gateway has to reach another one.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

logger = logging.getLogger("ray.serve")

POLL_S = 5.0
"""Seconds for which a call for questions stays open."""

FORGOTTEN_S = 12.0
"""Seconds without a call after which a gateway is gone. Until then it is named as one that does not answer."""

ANSWERS_S = 1.0
"""Seconds for the answers to a question. A gateway that is later is named, not waited for."""

AGAIN_S = 1.0
"""Seconds before a gateway calls again if the keeper is away."""

OTHERS = "the other gateways"
"""The name of the others, if the keeper is away and nobody knows them."""

Question = tuple[str, tuple[Any, ...]]
"""A method of `LiveRequests`, and its arguments."""


@dataclass
class Seat:
    """A gateway, as the keeper sees it: when it last called, and the questions that it must be asked."""

    heard_at: float = 0.0
    questions: list[tuple[int, Question]] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)


class Exchange:
    """The keeper's part. All its methods run on one event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.attended_at = 0.0  # when any gateway last called
        self._seats: dict[str, Seat] = {}
        self._numbers = itertools.count()
        self._awaited: dict[tuple[int, str], asyncio.Future[Any]] = {}

    async def attend(self, gateway: str) -> list[tuple[int, Question]]:
        """Wait for questions to a gateway; none if nobody asks for a while."""
        seat = self._seats.setdefault(gateway, Seat())
        seat.heard_at = self.attended_at = time.monotonic()
        if not seat.questions:
            try:
                await asyncio.wait_for(seat.asked.wait(), POLL_S)
            except TimeoutError:
                return []
        seat.asked.clear()
        questions, seat.questions = seat.questions, []
        return questions

    async def answer(self, number: int, gateway: str, answer: Any) -> None:
        """Take a gateway's answer to a question."""
        awaited = self._awaited.get((number, gateway))
        if awaited is not None and not awaited.done():
            awaited.set_result(answer)

    async def ask(self, gateway: str, question: Question) -> tuple[list[Any], list[str]]:
        """The answers of the others to a question of this gateway, and the names of those that are silent."""
        now, number = time.monotonic(), next(self._numbers)
        self._seats = {name: seat for name, seat in self._seats.items() if now - seat.heard_at < FORGOTTEN_S}
        awaited: dict[str, asyncio.Future[Any]] = {}
        for name, seat in self._seats.items():
            if name != gateway:
                awaited[name] = self._awaited[number, name] = asyncio.get_running_loop().create_future()
                seat.questions.append((number, question))
                seat.asked.set()
        try:
            if awaited:
                await asyncio.wait(awaited.values(), timeout=ANSWERS_S)
        finally:
            for name in awaited:
                del self._awaited[number, name]
        answers = [each.result() for each in awaited.values() if each.done()]
        return answers, sorted(name for name, each in awaited.items() if not each.done())


class Colleagues:
    """A gateway's part.

    Args:
        gateway: its name.
        answer: answers a question.
        find_keeper: returns the handle of the actor with the methods of `Exchange`; blocks.
    """

    def __init__(
        self, gateway: str, answer: Callable[[Question], Awaitable[Any]], find_keeper: Callable[[], Any]
    ) -> None:
        self._gateway, self._answer, self._find_keeper = gateway, answer, find_keeper
        self._several = False
        self._keeper: Any = None  # while it answers
        self._attending: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Task[None]] = set()

    def follow(self, several: bool) -> None:
        """Say whether there are other gateways."""
        self._several = several
        if several and (self._attending is None or self._attending.done()):
            self._attending = asyncio.create_task(self._attend())

    async def ask(self, question: Question) -> tuple[list[Any], list[str]]:
        """The answers of all gateways, this one first, and the names of those that do not answer in time."""
        own = asyncio.ensure_future(self._answer(question))
        answers, silent = await self._ask_others(question) if self._several else ([], [])
        return [await own, *answers], silent

    async def _ask_others(self, question: Question) -> tuple[list[Any], list[str]]:
        if self._keeper is None:
            return [], [OTHERS]
        try:
            asked = _result(self._keeper.ask.remote(self._gateway, question))
            found: tuple[list[Any], list[str]] = await asyncio.wait_for(asked, 2 * ANSWERS_S)
            return found
        except (RayError, TimeoutError) as error:
            logger.warning("the other gateways cannot be asked: %s", error)
            return [], [OTHERS]

    async def _attend(self) -> None:
        """Answer questions, one call after another."""
        while self._several:
            try:
                keeper = self._keeper or await asyncio.to_thread(self._find_keeper)
                attended = keeper.attend.remote(self._gateway)
                self._keeper = keeper
                for number, question in await asyncio.wait_for(_result(attended), 2 * POLL_S):
                    task = asyncio.create_task(self._tell(keeper, number, question))
                    self._answering.add(task)
                    task.add_done_callback(self._answering.discard)
            except Exception as error:  # whatever it is, questions must be heard again
                logger.warning("questions of other gateways cannot be heard: %s", error)
                self._keeper = None
                await asyncio.sleep(AGAIN_S)

    async def _tell(self, keeper: Any, number: int, question: Question) -> None:
        keeper.answer.remote(number, self._gateway, await self._answer(question))


async def _result(reference: Any) -> Any:
    return await reference
