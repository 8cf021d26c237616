"""Answers: the requests of a gang that have left its ranks and whose pictures rank 0 still encodes.

`workers.gang.rank_group` opens one for each request that was drawn; it ends when its result is there, or cannot come.
The next request waits while too many are open: their pictures take memory of the host.
"""

import asyncio
from collections.abc import Awaitable, Callable

from workers.messages import Answer, GenerationResult
from workers.metrics import Loss

MOST_OPEN = 2
"""Answers of a gang at once: one is encoded, one waits. A request begins only if fewer are open."""


KEPT_S = 10.0
"""A result stays here for so long after it has come. Ray forgets what nobody holds, and whoever asked holds it once he
has read the answer's reference, which a busy gateway does late."""


class Answers:
    """Those of one gang's ranks.

    Args:
        patience_s: how long encoding one may take.
        lose: called with the kind of loss and the reason if it takes longer.

    Attributes:
        any_given: some answer has come.
    """

    def __init__(self, patience_s: float, lose: Callable[[Loss, str], None]) -> None:
        self._patience_s = patience_s
        self._lose = lose
        self.any_given = False
        self._open: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, result: Awaitable[GenerationResult]) -> Answer:
        """Follow an answer to its end, whether or not somebody waits for it."""
        following = asyncio.create_task(self._follow(result))
        self._open.add(following)
        following.add_done_callback(self._open.discard)
        return Answer(result)

    async def room(self) -> None:
        """Wait until another request may begin."""
        while len(self._open) >= MOST_OPEN:
            await asyncio.wait(self._open, return_when=asyncio.FIRST_COMPLETED)

    async def given(self) -> None:
        """Wait until none is open."""
        while self._open:
            await asyncio.wait(self._open)

    async def _follow(self, result: Awaitable[GenerationResult]) -> None:
        coming = asyncio.ensure_future(self._end(result))
        patience_s = self._patience_s * len(self._open)  # those before it are encoded first
        done, _ = await asyncio.wait([coming], timeout=patience_s)
        asyncio.get_running_loop().call_later(KEPT_S, lambda _: None, result)  # holds it until then
        if not done:
            coming.cancel()
            self._lose("encoding", f"rank 0 has not encoded an answer within {patience_s:g} s")

    async def _end(self, result: Awaitable[GenerationResult]) -> None:
        try:
            await result
            self.any_given = True
        except Exception:
            return  # it is raised where the answer is awaited, and the ranks' watch notices their end by itself
