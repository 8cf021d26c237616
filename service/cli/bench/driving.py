"""Sends a load: in an open loop at planned times, in a closed loop by a number of callers. For the command `bench`.

In an open loop nothing holds a request back. If this program sends it late, the delay counts as part of its time. So a
pause of the server shows in all requests that were due meanwhile.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import httpx

from service.cli.bench import sending
from service.cli.bench.load import Planned
from service.cli.bench.sending import Outcome
from service.cli.client import ServerError

TOLD_EVERY_S = 10.0


class Drive:
    """One run. `outcomes` grows while it runs, and stays after an interruption.

    Args:
        server: its base URL.
        timeout_s: the timeout of each request, in seconds.
        say: called with a line every ten seconds.
    """

    def __init__(self, server: str, timeout_s: float, say: Callable[[str], None]) -> None:
        self.outcomes: list[Outcome] = []
        self.unfinished = 0
        self.seconds = 0.0
        self._server, self._timeout_s, self._say = server, timeout_s, say
        self._began = 0.0

    async def warm_up(self, planned: Planned, at_once: int) -> None:
        """Send a request that is not measured, so many times at once: one after another would all go to one gang.

        Raises:
            ServerError: none was answered.
        """
        now = asyncio.get_running_loop().time()
        async with sending.client(self._server) as http:
            sent = (sending.send(http, planned, now, now, self._timeout_s) for _ in range(at_once))
            outcomes = await asyncio.gather(*sent)
        outcome = outcomes[0]
        if all(each.code != sending.OK for each in outcomes):  # a full queue may have refused some
            raise ServerError(f"warm-up, a request of {outcome.kind!r}: {outcome.message or outcome.code}")

    async def open_loop(self, planned: Iterator[Planned]) -> None:
        """Send each request at its time, and wait for all answers."""
        loop = asyncio.get_running_loop()
        async with self._running() as http, asyncio.TaskGroup() as tasks:
            for one in planned:
                due = self._began + one.at_s
                await asyncio.sleep(due - loop.time())
                tasks.create_task(self._send(http, one, due))

    async def closed_loop(self, planned: Iterator[Planned], callers: int, duration_s: float | None) -> None:
        """Each caller sends its next request when its last is answered."""
        loop = asyncio.get_running_loop()

        async def call(http: httpx.AsyncClient) -> None:
            for one in planned:
                await self._send(http, one, loop.time())
                if duration_s is not None and loop.time() - self._began > duration_s:
                    return

        async with self._running() as http, asyncio.TaskGroup() as tasks:
            for _ in range(callers):
                tasks.create_task(call(http))

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[httpx.AsyncClient]:
        loop = asyncio.get_running_loop()
        self._began = loop.time()
        telling = asyncio.ensure_future(self._tell())
        try:
            async with sending.client(self._server) as http:
                yield http
        finally:
            self.seconds = loop.time() - self._began
            telling.cancel()

    async def _send(self, http: httpx.AsyncClient, one: Planned, due: float) -> None:
        self.unfinished += 1
        self.outcomes.append(await sending.send(http, one, self._began, due, self._timeout_s))
        self.unfinished -= 1  # a request that is interrupted remains unfinished

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(TOLD_EVERY_S)
            failed = sum(one.code != sending.OK for one in self.outcomes)
            passed_s = asyncio.get_running_loop().time() - self._began
            self._say(
                f"{passed_s:.0f} s: {len(self.outcomes) - failed} answered, {failed} failed, "
                f"{self.unfinished} under way"
            )
