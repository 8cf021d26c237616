"""A request's deadline: what passes it is stopped, what cannot meet it is refused."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

import pytest

from service.deadline import check_deadline, within
from workers.errors import DeadlineExceeded


class Source:
    """Reports that come every so often, and whether they were closed."""

    def __init__(self, *pauses_s: float) -> None:
        self.pauses_s, self.closed = pauses_s, False

    async def reports(self) -> AsyncGenerator[int]:
        try:
            for number, pause_s in enumerate(self.pauses_s):
                await asyncio.sleep(pause_s)
                yield number
        finally:
            self.closed = True


async def collect(source: Source, seconds: float) -> list[int]:
    return [report async for report in within(time.time() + seconds, source.reports())]


def test_in_time_nothing_changes() -> None:
    source = Source(0, 0.01, 0)
    assert asyncio.run(collect(source, 60)) == [0, 1, 2]
    assert source.closed


def test_what_is_too_late_is_closed() -> None:
    source, found = Source(0, 60), []

    async def story() -> None:
        with pytest.raises(DeadlineExceeded):
            async for report in within(time.time() + 0.2, source.reports()):
                found.append(report)
        assert source.closed

    asyncio.run(story())
    assert found == [0]


def test_its_own_errors_come_through() -> None:
    async def failing() -> AsyncGenerator[int]:
        yield 0
        raise ZeroDivisionError

    async def story() -> None:
        reports = within(time.time() + 60, failing())
        assert await anext(reports) == 0
        with pytest.raises(ZeroDivisionError):
            await anext(reports)

    asyncio.run(story())


def test_a_caller_who_leaves_closes_it() -> None:
    source = Source(0, 60)

    async def story() -> None:
        async with contextlib.aclosing(within(time.time() + 60, source.reports())) as reports:
            assert await anext(reports) == 0
            leaving = asyncio.ensure_future(anext(reports))
            await asyncio.sleep(0.01)
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leaving
        assert source.closed

    asyncio.run(story())


def test_what_cannot_be_met_is_refused_with_the_estimate() -> None:
    now = time.time()
    check_deadline(now + 10, 9)
    check_deadline(now + 10, 0)
    with pytest.raises(DeadlineExceeded, match=r"wait about 25\.0 s; its deadline is in 10\.0 s"):
        check_deadline(now + 10, 25)
    check_deadline(now + 10, 4, takes_s=5, least_s=5)
    check_deadline(now + 10, 4, takes_s=60, least_s=0)  # nobody has measured it
    with pytest.raises(
        DeadlineExceeded, match=r"in about 11\.5 s, 4\.0 s of them until .*; its deadline is in 10\.0 s"
    ):
        check_deadline(now + 10, 4, takes_s=7.5, least_s=6.5)
    with pytest.raises(DeadlineExceeded):
        check_deadline(now - 1, 0)
