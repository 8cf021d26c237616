"""A request ends when its deadline has passed, whether it waits or runs. For `service.gateway`."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import TypeVar

from workers.errors import DeadlineExceeded

Report = TypeVar("Report")


async def within(deadline_at: float, reports: AsyncGenerator[Report]) -> AsyncGenerator[Report]:
    """The reports of a request, as long as there is time. They are closed at the end, which frees the gang.

    Args:
        deadline_at: seconds since the epoch.
        reports: of the request.

    Raises:
        DeadlineExceeded: the next report did not come in time.
    """
    async with contextlib.aclosing(reports):
        while True:
            coming = asyncio.ensure_future(anext(reports, None))
            try:
                done, _ = await asyncio.wait([coming], timeout=max(0.0, deadline_at - time.time()))
            finally:
                await _end(coming)
            if not done:
                raise DeadlineExceeded("the request's deadline has passed; it was stopped")
            if (report := coming.result()) is None:
                return
            yield report


async def _end(report: "asyncio.Future[Report | None]") -> None:
    """Let a pending report end before its generator is closed, however often this task is canceled meanwhile."""
    canceled: asyncio.CancelledError | None = None
    if not report.done():
        report.cancel()
    while not report.done():
        try:
            await asyncio.wait([report])
        except asyncio.CancelledError as error:
            canceled = error
    if canceled is not None:
        raise canceled


def check_deadline(deadline_at: float, wait_s: float) -> None:
    """Refuse a request whose turn would not come in time.

    Args:
        deadline_at: seconds since the epoch.
        wait_s: estimated seconds until its turn; 0: unknown.

    Raises:
        DeadlineExceeded: it could not.
    """
    left_s = deadline_at - time.time()
    if wait_s >= left_s:
        raise DeadlineExceeded(
            f"the request would have to wait about {wait_s:.1f} s, its deadline is in {max(0.0, left_s):.1f} s"
        )
