"""Turn: who has the ranks of a gang. One alone, such as a change of adapters, or several requests of an elastic gang.

Used by `workers.gang.gang`. Who wants the ranks alone comes before requests that come later.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Turn:
    """The ranks of one gang. On one event loop."""

    def __init__(self) -> None:
        self._door = asyncio.Lock()  # whoever is alone keeps it; whoever shares only passes
        self._sharing = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Have the ranks alone, once all others have left."""
        async with self._door:
            await self._empty.wait()
            yield

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Have them together with others that share."""
        async with self._door:
            self._sharing += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._sharing -= 1
            if not self._sharing:
                self._empty.set()
