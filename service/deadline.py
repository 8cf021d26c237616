"""A request ends when its deadline has passed or somebody cancels it, whether it waits or runs. For `service.state`."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from workers.errors import DeadlineExceeded, RequestCancelled

Report = TypeVar("Report")


async def within(
    deadline_at: float | None, reports: AsyncGenerator[Report], canceled: "asyncio.Future[None] | None" = None
) -> AsyncGenerator[Report]:
    """The reports of a request, as long as it is wanted. They are closed at the end, which frees the gang.

    Args:
        deadline_at: seconds since the epoch; None: there is no deadline.
        reports: of the request.
        canceled: done when nobody wants them anymore; None: only closing the generator ends it.

    Raises:
        DeadlineExceeded: the next report did not come in time.
        RequestCancelled: the request was canceled before it came.
    """
    async with contextlib.aclosing(reports):
        while True:
            coming = asyncio.ensure_future(anext(reports, None))
            try:
                left_s = None if deadline_at is None else max(0.0, deadline_at - time.time())
                ends: list[asyncio.Future[Any]] = [coming, *([canceled] if canceled is not None else [])]
                done, _ = await asyncio.wait(ends, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _end(coming)
            if canceled in done:
                raise RequestCancelled("the request was canceled by another call")
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


def check_deadline(deadline_at: float, wait_s: float, takes_s: float = 0.0, least_s: float = 0.0) -> None:
    """Refuse a request that would not be answered in time.

    Args:
        deadline_at: seconds since the epoch.
        wait_s: estimated seconds until its turn; 0: unknown.
        takes_s: estimated seconds that it takes then; 0: unknown.
        least_s: what it takes at the very least. Only this counts: estimates are scaled from other sizes, and who is
            refused teaches the gang nothing better.

    Raises:
        DeadlineExceeded: it would not.
    """
    left_s = deadline_at - time.time()
    if wait_s + least_s < left_s:
        return
    takes_s = max(takes_s, least_s)
    eta = f"the request would be answered in about {wait_s + takes_s:.1f} s, {wait_s:.1f} s of them until its turn"
    if not takes_s:
        eta = f"the request would have to wait about {wait_s:.1f} s"
    raise DeadlineExceeded(f"{eta}; its deadline is in {max(0.0, left_s):.1f} s")
