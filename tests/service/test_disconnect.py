"""A request ends when nobody waits for its answer: the client has left, or the proxy was killed."""

import asyncio
from typing import Any

import pytest

from service.api.rest import rest_app
from tests.support.backend import FakeBackend

BODY = b'{"model": "paint", "prompt": "slow"}'
SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "path": "/v1/images/generations",
    "raw_path": b"/v1/images/generations",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
}


@pytest.mark.parametrize("end", [{"type": "http.disconnect"}, ConnectionError("the proxy died")])
def test_nothing_is_drawn_for_nobody(end: Any) -> None:
    backend, sent = FakeBackend(), []
    messages: list[Any] = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def story() -> None:
        leave = asyncio.Event()

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await leave.wait()
            if isinstance(end, Exception):
                raise end
            return end

        async def send(message: Any) -> None:
            sent.append(message)

        answering = asyncio.ensure_future(rest_app(backend)(dict(SCOPE), receive, send))
        async with asyncio.timeout(60):
            while not backend.requests:
                await asyncio.sleep(0.01)
            leave.set()
            await answering
        assert backend.closed

    asyncio.run(story())
    assert sent == []
