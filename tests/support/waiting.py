"""Waiting in a test's event loop, however long a busy machine takes."""

import asyncio
from collections.abc import Callable


async def until(seen: Callable[[], object]) -> None:
    """Let others run until it holds.

    Raises:
        TimeoutError: it never came about.
    """
    async with asyncio.timeout(60):
        while not seen():
            await asyncio.sleep(0.01)
