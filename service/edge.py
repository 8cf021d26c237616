"""What stands between the network and Serve in the proxy of each node: limits on reading requests, and errors.

Serve's proxies call `middlewares` when they start, as `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names it. A request
reaches the gateway when its body is there, so slow senders take none of the gateway's slots. What Serve says by itself,
such as that a gateway has died, comes in the envelope of all other errors, and pages that may call the gateway may read
it. The gRPC port is `service.rpc.proxy`'s.
"""

import asyncio
import functools
import json
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from service.api.errors import GATEWAY_GONE, GATEWAY_LOST, RETRY_AFTER_S, envelope
from service.api.origin import ID_HEADER, PASSED_TIMEOUT_HEADER, TIMEOUT_HEADER
from service.rpc import proxy

HEADER_S = 10.0
"""For the head of a request, from the connection or from the first byte of the next head on it."""

MAX_HEADER_BYTES = 64 << 10

BODY_S = 30.0
"""For the body. The gateway gives up after the same time where a body is too large to be held here."""

HELD_BYTES = 4 << 20
"""Of one body. Whatever is larger goes on to the gateway, which refuses bodies that exceed the deployment's limit."""

ALL_HELD_BYTES = 256 << 20
"""Of all bodies that are being read."""


def middlewares() -> list[Middleware]:
    """Called by Serve in each proxy, before it listens."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = "service.edge:LimitedProtocol"
    proxy.prepare()
    return [Middleware(Edge)]


PASSED_AS = {TIMEOUT_HEADER.encode(): PASSED_TIMEOUT_HEADER.encode()}
"""Headers that the gateway gets under another name, for Serve's proxy acts on them."""


class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # uvicorn chooses its base at run time
    """An HTTP connection that is closed when the head of a request is late or too long."""

    _waiting: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        before = self.cycle
        of_body = before is not None and before.more_body  # also of one that was answered before its end
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # a head is there, and its answer is not
            self._stop_waiting()
        else:
            self._wait_for_head()
        of_head = not of_body and self.cycle is before  # also of the next request's, while an answer is under way
        self._head_bytes = self._head_bytes + len(data) if of_head else 0
        if self._head_bytes > MAX_HEADER_BYTES:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn where bytes are no HTTP. An answer to a request before them is cut, not mixed with this."""
        under_way = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not under_way:
            body = json.dumps(envelope(f"no HTTP: {msg}", "invalid_request_error", None, "invalid_http")).encode()
            head = {"content-type": "application/json", "content-length": len(body), "x-should-retry": "false"}
            lines = "".join(f"{name}: {value}\r\n" for name, value in (head | {"connection": "close"}).items())
            self.transport.write(f"HTTP/1.1 400 Bad Request\r\n{lines}\r\n".encode() + body)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


PAGES = 1000
"""Origins that are remembered; the one that was not asked from for longest is forgotten."""

ALLOW = b"access-control-allow-origin"
READABLE = b"retry-after, x-request-id, x-should-retry"


class Pages:
    """Which origins the gateway allows, by its last answer to each: what the deployment file names changes at any time.

    A browser asks before a page calls, so that the answer to that comes first.
    """

    def __init__(self) -> None:
        self._allowed: dict[bytes, bytes] = {}  # by origin: what the gateway said

    def learn(self, origin: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """The gateway has answered a request from there with these headers."""
        self._allowed.pop(origin, None)
        if allowed := dict(headers).get(ALLOW):
            self._allowed[origin] = allowed  # the last one
            if len(self._allowed) > PAGES:
                del self._allowed[next(iter(self._allowed))]

    def headers(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        """Of an answer that a page from there may read; none if it may not."""
        if (allowed := self._allowed.get(origin)) is None:
            return []
        return [(ALLOW, allowed), (b"access-control-expose-headers", READABLE), (b"vary", b"Origin")]


class Edge:
    """Holds a request until its body is there, and puts Serve's own errors into the envelope."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._held = 0
        self._pages = Pages()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by the server for each request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope.get("headers", ()))
        request_id, origin = headers.get(ID_HEADER.encode()) or uuid.uuid4().hex.encode(), headers.get(b"origin")
        refuse = functools.partial(_refuse, send, request_id, self._pages.headers(origin) if origin else [])
        messages: list[Message] = []
        try:
            async with asyncio.timeout(BODY_S):
                held = await self._read(receive, messages)
        except TimeoutError:
            text = f"the body did not arrive within {BODY_S:g} s"
            await refuse(408, text, "invalid_request_error", "body_timeout", {"x-should-retry": "false"})
            return
        finally:
            self._held -= sum(len(message.get("body", b"")) for message in messages)
        if not held:
            text = "too many requests are being read"
            await refuse(503, text, "server_error", "overloaded", {"retry-after": str(RETRY_AFTER_S)})
            return
        if messages[-1]["type"] == "http.disconnect":
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        given = [pair for pair in scope.get("headers", ()) if pair[0] != ID_HEADER.encode()]
        own = [(PASSED_AS.get(name, name), value) for name, value in given]
        learn = functools.partial(self._pages.learn, origin) if origin else lambda headers: None
        answer = _InEnvelope(send, refuse, learn)
        await self._app({**scope, "headers": [*own, (ID_HEADER.encode(), request_id)]}, replay, answer)
        await answer.end()

    async def _read(self, receive: Receive, messages: list[Message]) -> bool:
        """Append the messages of a body to those given; return False if they exceed `ALL_HELD_BYTES`."""
        size, more = 0, True
        while more and size <= HELD_BYTES:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            self._held += len(message.get("body", b""))
            if self._held > ALL_HELD_BYTES:
                return False
            more = message.get("more_body", False)
        return True


class _InEnvelope:
    """Sends what the gateway answers, and replaces what Serve says without one, which is plain text."""

    def __init__(
        self, send: Send, refuse: Callable[..., Awaitable[None]], learn: Callable[[list[tuple[bytes, bytes]]], None]
    ) -> None:
        self._send, self._refuse, self._learn = send, refuse, learn
        self._replaced = False
        self._begun = False

    async def __call__(self, message: Message) -> None:
        self._begun = True
        if message["type"] == "http.response.start" and message["status"] >= 400:
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._replaced = not kind.startswith(b"application/json")
        if message["type"] == "http.response.start" and not self._replaced:
            self._learn(message["headers"])
        if not self._replaced:
            await self._send(message)
        elif not message.get("more_body", message["type"] == "http.response.start"):
            await self._answer()

    async def end(self) -> None:
        """Answer if nobody has: what Serve does when a gateway dies before it has answered."""
        if not self._begun:
            await self._answer()

    async def _answer(self) -> None:
        await self._refuse(503, GATEWAY_GONE, "server_error", GATEWAY_LOST, {"retry-after": str(RETRY_AFTER_S)})


async def _refuse(
    send: Send,
    request_id: bytes,
    readable: list[tuple[bytes, bytes]],
    status: int,
    text: str,
    kind: str,
    code: str,
    headers: dict[str, str],
) -> None:
    """Answer with an error; the connection ends, for the rest of a body may still come."""
    body = json.dumps(envelope(text, kind, None, code)).encode()
    found: dict[str, Any] = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
    raw = [(name.encode(), str(value).encode()) for name, value in (found | headers).items()]
    raw += [(ID_HEADER.encode(), request_id), *readable]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
