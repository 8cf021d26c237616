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

from service.api import errors
from service.api.errors import GATEWAY_GONE, GATEWAY_LOST, RETRY_AFTER_S, envelope
from service.api.origin import ID, ID_HEADER, PASSED_TIMEOUT_HEADER, TIMEOUT_HEADER
from service.rpc import proxy

HEADER_S = 10.0
"""For the head of a request, from the connection or from the first byte of the next head on it."""

MAX_HEADER_BYTES = 64 << 10

BODY_S = 30.0
"""For the body. The gateway gives up after the same time where a body is too large to be held here."""

HELD_BYTES = 4 << 20
"""Of one body. Whatever is larger goes on to the gateway, which refuses bodies that exceed the deployment's limit."""

SMALL_BYTES = 64 << 10
"""Up to which a body is a small one. These have room of their own, so that slow senders of large ones keep none out."""

ALL_HELD_BYTES, ALL_SMALL_BYTES = 256 << 20, 64 << 20
"""Of all bodies that are being read: of large ones, and of small ones."""


def middlewares() -> list[Middleware]:
    """Called by Serve in each proxy, before it listens."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = "service.edge:LimitedProtocol"
    proxy.prepare()
    return [Middleware(Edge)]


PASSED_AS = {TIMEOUT_HEADER.encode(): PASSED_TIMEOUT_HEADER.encode()}
"""Headers that the gateway gets under another name, for Serve's proxy acts on them."""

DROPPED = (b"serve_multiplexed_model_id", b"x_session_id", b"x_request_disconnect_disabled")
"""Headers that are for Serve alone, which reads a hyphen as an underscore. It fails if they are not UTF-8; the last one
would let a request go on that its caller has left."""


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
        self._held = {"small": 0, "large": 0}
        self._pages = Pages()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by the server for each request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope.get("headers", ()))
        request_id, origin = _id(headers.get(ID_HEADER.encode(), b"")), headers.get(b"origin")
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
            self._hold(sum(len(message.get("body", b"")) for message in messages), 0)
        if not held:
            text = "too many requests are being read"
            await refuse(503, text, "server_error", "overloaded", {"retry-after": str(RETRY_AFTER_S)})
            return
        if messages[-1]["type"] == "http.disconnect":
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        learn = functools.partial(self._pages.learn, origin) if origin else lambda headers: None
        answer = _InEnvelope(send, refuse, learn)
        try:
            await self._app({**scope, "headers": _passed(scope.get("headers", ()), request_id)}, replay, answer)
        except Exception as error:
            if answer.sent:
                raise
            errors.log(error)
            status, body, more = errors.answer(error)
            await refuse(status, body["error"]["message"], body["error"]["type"], body["error"]["code"], more)
            return
        await answer.end()

    async def _read(self, receive: Receive, messages: list[Message]) -> bool:
        """Append the messages of a body to those given; return False if there is no room for it."""
        size, more = 0, True
        while more and size <= HELD_BYTES:
            message = await receive()
            messages.append(message)
            before, size = size, size + len(message.get("body", b""))
            self._hold(before, size)
            if self._held[_kind(size)] > (ALL_SMALL_BYTES if size <= SMALL_BYTES else ALL_HELD_BYTES):
                return False
            more = message.get("more_body", False)
        return True

    def _hold(self, before: int, now: int) -> None:
        """A body had `before` bytes, and has `now`."""
        self._held[_kind(before)] -= before
        self._held[_kind(now)] += now


def _kind(size: int) -> str:
    return "small" if size <= SMALL_BYTES else "large"


def _id(given: bytes) -> bytes:
    """The id of a request: the given one, if it can be one."""
    return given if ID.fullmatch(given.decode("latin-1")) else uuid.uuid4().hex.encode()


def _passed(headers: Iterable[tuple[bytes, bytes]], request_id: bytes) -> list[tuple[bytes, bytes]]:
    """The headers that Serve and the gateway get."""
    kept = [pair for pair in headers if pair[0].replace(b"-", b"_").lower() not in DROPPED]
    own = [(PASSED_AS.get(name, name), value) for name, value in kept if name != ID_HEADER.encode()]
    return [*own, (ID_HEADER.encode(), request_id)]


class _InEnvelope:
    """Sends what the gateway answers, and replaces what Serve says without one, which is plain text.

    Attributes:
        sent: whether the caller has got anything.
    """

    def __init__(
        self, send: Send, refuse: Callable[..., Awaitable[None]], learn: Callable[[list[tuple[bytes, bytes]]], None]
    ) -> None:
        self._send, self._refuse, self._learn = send, refuse, learn
        self._replaced = False
        self._begun = False
        self.sent = False

    async def __call__(self, message: Message) -> None:
        self._begun = True
        if message["type"] == "http.response.start" and message["status"] >= 400:
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._replaced = not kind.startswith(b"application/json")
        if message["type"] == "http.response.start" and not self._replaced:
            self._learn(message["headers"])
        if not self._replaced:
            self.sent = True
            await self._send(message)
        elif not message.get("more_body", message["type"] == "http.response.start"):
            await self._answer()

    async def end(self) -> None:
        """Answer if nobody has: what Serve does when a gateway dies before it has answered."""
        if not self._begun:
            await self._answer()

    async def _answer(self) -> None:
        self.sent = True
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
