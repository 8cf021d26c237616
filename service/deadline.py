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
                if not coming.done():  # it must have ended before its generator can be closed
                    coming.cancel()
                    await asyncio.wait([coming])
            if not done:
                raise DeadlineExceeded("the request's deadline has passed; it was stopped")
            if (report := coming.result()) is None:
                return
            yield report


def check_deadline(deadline_at: float, wait_s: float) -> None:
    """Refuse a request that could not be done in time.

    Args:
        deadline_at: seconds since the epoch.
        wait_s: seconds until its turn, and what requests take on average; 0: unknown.

    Raises:
        DeadlineExceeded: it could not.
    """
    left_s = deadline_at - time.time()
    if left_s <= 0 or wait_s > left_s:
        raise DeadlineExceeded(
            f"the request would take about {wait_s:.0f} s from now, its deadline is in {max(0.0, left_s):.0f} s"
        )
