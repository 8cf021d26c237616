"""What a proxy does before and after the gateway, on uvicorn and without Ray."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import edge
from service.rollout.environment import PRIVATE_CLUSTER

HEAD = b"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ncontent-length: "


class Gateway:
    """Answers with the size of a body, or as Serve does without a gateway; counts what it is doing."""

    def __init__(self) -> None:
        self.at_once = 0
        self.most = 0
        self.answer: tuple[int, bytes, bytes] | None = None
        self.allowed = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            size, more = 0, True
            while more:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
            status, kind, text = self.answer or (200, b"text/plain", str(size).encode())
            cors = [(edge.ALLOW, self.allowed)] if self.allowed else []
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *cors]})
            await send({"type": "http.response.body", "body": text, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.at_once -= 1


@contextlib.asynccontextmanager
async def proxy(gateway: ASGIApp) -> AsyncIterator[int]:
    """A server as Serve starts it; yields its port."""
    (middleware,) = edge.middlewares()
    app = middleware.cls(gateway)
    server = uvicorn.Server(uvicorn.Config(lambda: app, factory=True, lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0), backlog=2000) as listening:
        serving = asyncio.ensure_future(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield listening.getsockname()[1]
        server.force_exit = server.should_exit = True
        await serving


async def ask(port: int, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes, and read what comes until the connection ends or a whole answer is there."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    body = await reader.readexactly(int(headers["content-length"])) if "content-length" in headers else b""
    if not body:
        body = await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    return int(lines[0].split()[1]), headers, body


def test_unfinished_bodies_take_no_slot_and_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "BODY_S", 6.0)
    gateway = Gateway()

    async def story() -> None:
        async with proxy(gateway) as port:
            slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(300)]
            for _, writer in slow:
                writer.write(HEAD + b"1000\r\n\r\n{")
            began = asyncio.get_running_loop().time()
            status, _, _ = await ask(port, b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n")
            assert (status, gateway.most) == (200, 1)
            assert asyncio.get_running_loop().time() - began < 5
            late = await slow[0][0].read()
            assert late.startswith(b"HTTP/1.1 408")
            assert json.loads(late.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"
            for _, writer in slow:
                writer.close()

    asyncio.run(story())


@pytest.mark.parametrize("size", [0, 5, 300_000, edge.HELD_BYTES + 300_000])
def test_a_body_arrives_whole(size: int) -> None:
    async def story() -> None:
        async with proxy(Gateway()) as port:
            status, _, body = await ask(port, HEAD + str(size).encode() + b"\r\n\r\n" + b"x" * size)
            assert (status, str(size).encode() in body) == (200, True)

    asyncio.run(story())


@pytest.mark.parametrize(("room", "small"), [("ALL_HELD_BYTES", 4), ("ALL_SMALL_BYTES", edge.SMALL_BYTES)])
def test_bodies_are_held_within_bounds(monkeypatch: pytest.MonkeyPatch, room: str, small: int) -> None:
    monkeypatch.setattr(edge, "SMALL_BYTES", small)
    monkeypatch.setattr(edge, room, 10)

    async def story() -> None:
        async with proxy(Gateway()) as port:
            for _ in range(2):  # what is refused is not held
                status, headers, body = await ask(port, HEAD + b"20\r\n\r\n" + b"x" * 20)
                assert (status, headers["retry-after"]) == (503, "5")
                assert json.loads(body)["error"]["code"] == "overloaded"
                assert (await ask(port, HEAD + b"8\r\n\r\n" + b"x" * 8))[0] == 200

    asyncio.run(story())


def test_large_bodies_that_never_end_keep_no_small_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "ALL_HELD_BYTES", 5 * edge.SMALL_BYTES // 2)
    size = 2 * edge.SMALL_BYTES

    async def story() -> None:
        async with proxy(Gateway()) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + str(size + 1).encode() + b"\r\n\r\n" + b"x" * size)
            await writer.drain()
            async with asyncio.timeout(20):
                while (await ask(port, HEAD + str(size).encode() + b"\r\n\r\n" + b"x" * size))[0] != 503:
                    await asyncio.sleep(0.05)  # the other one has not arrived yet
            small = edge.SMALL_BYTES
            assert (await ask(port, HEAD + str(small).encode() + b"\r\n\r\n" + b"x" * small))[0] == 200
            writer.write(b"x")
            async with asyncio.timeout(20):
                while (await ask(port, HEAD + str(size).encode() + b"\r\n\r\n" + b"x" * size))[0] != 200:
                    await asyncio.sleep(0.05)
            writer.close()

    asyncio.run(story())


@pytest.mark.parametrize("sent", [b"", b"POST /v1/images/gener", b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\nGET /li"])
def test_a_head_that_never_ends_closes_the_connection(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(edge, "HEADER_S", 0.3)

    async def story() -> None:
        async with proxy(Gateway()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            first, end, rest = sent.rpartition(b"\r\n\r\n")
            writer.write(first + end)
            if end:  # a second request on the same connection
                assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
            writer.write(rest)
            assert await asyncio.wait_for(reader.read(), 3) == b""
            writer.close()

    asyncio.run(story())


@pytest.mark.parametrize("before", [b"", b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n"])
@pytest.mark.parametrize("sent", [b"\x00\x01\r\n\r\n", b"FOO / HTTP/1.1\r\n\r\n", HEAD + b"-5\r\n\r\n"])
def test_what_is_no_http_is_refused_in_the_envelope(before: bytes, sent: bytes) -> None:
    async def story() -> None:
        async with proxy(Gateway()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if before:
                writer.write(before)
                assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
            writer.write(sent)
            head, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 Bad Request")
            assert b"content-type: application/json" in head
            assert json.loads(body)["error"]["code"] == "invalid_http"
            writer.close()

    asyncio.run(story())


def test_what_is_no_http_does_not_get_into_an_answer() -> None:
    """Of a request before it: the answer ends there."""
    begun = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        begun.set()
        await asyncio.sleep(30)

    async def story() -> None:
        async with proxy(slow) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n")
            await begun.wait()
            writer.write(b"\x00\x01\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), 5)
            assert answer.endswith(b"4\r\nhalf\r\n")
            writer.close()

    asyncio.run(story())


def test_a_head_that_is_too_long_closes_the_connection() -> None:
    async def story() -> None:
        async with proxy(Gateway()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):
                for _ in range(4):
                    writer.write(b"GET /livez HTTP/1.1\r\nx: " + b"x" * edge.MAX_HEADER_BYTES)
                    await writer.drain()
                    await asyncio.sleep(0.05)
                assert await asyncio.wait_for(reader.read(), 3) == b""
            writer.close()

    asyncio.run(story())


def test_a_head_that_follows_an_unanswered_request_is_limited_as_well() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    async def story() -> None:
        async with proxy(never) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + b"0\r\n\r\n")
            await asyncio.sleep(0.1)
            with contextlib.suppress(ConnectionError):
                for _ in range(4):
                    writer.write(b"GET /livez HTTP/1.1\r\nx: " + b"x" * edge.MAX_HEADER_BYTES)
                    await writer.drain()
                    await asyncio.sleep(0.05)
                assert await asyncio.wait_for(reader.read(), 3) == b""
            writer.close()

    asyncio.run(story())


def test_the_rest_of_a_body_that_was_answered_early_is_no_head() -> None:
    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"2"), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    async def story() -> None:
        async with proxy(refuses) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            rest = 8 * edge.MAX_HEADER_BYTES
            writer.write(HEAD + str(edge.HELD_BYTES + 1 + rest).encode() + b"\r\n\r\n" + b"x" * (edge.HELD_BYTES + 1))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")
            assert await reader.readexactly(2) == b"{}"
            for _ in range(8):
                writer.write(b"x" * edge.MAX_HEADER_BYTES)
                await writer.drain()
                await asyncio.sleep(0.02)
            assert not reader.at_eof()
            writer.close()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("status", "kind", "answered", "code"),
    [
        (500, b"text/plain", 503, "gateway_lost"),
        (503, b"text/plain; charset=utf-8", 503, "gateway_lost"),
        (404, b"text/plain", 503, "gateway_lost"),  # Serve knows no path yet
        (500, b"application/json", 500, "of the gateway"),
    ],
)
def test_what_serve_says_by_itself_comes_in_the_envelope(status: int, kind: bytes, answered: int, code: str) -> None:
    gateway = Gateway()
    text = json.dumps({"error": {"code": code}}).encode() if kind == b"application/json" else b"The actor is dead."
    gateway.answer = status, kind, text
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    asyncio.run(edge.Edge(gateway)({"type": "http"}, receive, send))
    body: Any = json.loads(b"".join(message.get("body", b"") for message in sent))
    assert (sent[0]["status"], body["error"]["code"]) == (answered, code)
    if code == "gateway_lost":
        assert (b"retry-after", b"5") in sent[0]["headers"]
        assert "dead" not in json.dumps(body)


@pytest.mark.parametrize("given", [b"", b"mine"])
def test_what_the_edge_refuses_has_the_requests_id(given: bytes) -> None:
    sent: list[Message] = []
    seen: list[Any] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(value for name, value in scope["headers"] if name == b"x-request-id")

    scope = {"type": "http", "headers": [(b"x-request-id", given)] if given else []}
    asyncio.run(edge.Edge(silent)(scope, receive, send))
    answered = [value for name, value in sent[0]["headers"] if name == b"x-request-id"]
    assert answered == seen
    assert answered == [given] if given else len(answered[0]) == 32


SERVES_OWN = [
    b"serve_multiplexed_model_id",
    b"Serve-Multiplexed-Model-Id",
    b"x-session-id",
    b"x_session_id",
    b"x-request-disconnect-disabled",
]


@pytest.mark.parametrize("name", [b"x-request-id", *SERVES_OWN])
def test_no_header_makes_serve_fail(name: bytes) -> None:
    """Serve's proxy decodes these."""
    sent: list[Message] = []
    seen: list[tuple[bytes, bytes]] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    given = [(name, b"\xff"), (b"user-agent", b"\xe9")]
    asyncio.run(edge.Edge(serve)({"type": "http", "headers": given}, receive, send))
    (kept, (own, value)) = seen
    assert (kept, own, len(value.decode())) == (given[1], b"x-request-id", 32)


@pytest.mark.parametrize("begun", [False, True])
def test_a_mistake_behind_the_edge_is_answered_in_the_envelope(begun: bool, caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("secret detail")

    with contextlib.suppress(ValueError) if begun else contextlib.nullcontext():
        asyncio.run(edge.Edge(serve)({"type": "http", "headers": [(b"x-request-id", b"mine")]}, receive, send))
    if begun:
        assert [message["type"] for message in sent] == ["http.response.start"]
        return
    assert (sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"]) == (500, "internal_error")
    headers = dict(sent[0]["headers"])
    assert (headers[b"x-request-id"], headers[b"x-should-retry"]) == (b"mine", b"false")
    assert b"secret" not in sent[1]["body"] and "secret detail" in caplog.text


def test_a_gateway_that_dies_silently_is_said_in_the_envelope() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    asyncio.run(edge.Edge(silent)({"type": "http"}, receive, send))
    assert (sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"]) == (503, "gateway_lost")


def test_local_clusters_have_an_edge() -> None:
    assert PRIVATE_CLUSTER["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "service.edge:middlewares"


def test_a_page_that_may_call_may_read_what_the_proxy_says() -> None:
    """As its browser asks first, by the gateway's last answer to that origin."""
    gateway = Gateway()
    page, other = b"https://app.example.com", b"https://other.example.com"

    def call(origin: bytes) -> bytes:
        return b"POST /livez HTTP/1.1\r\nhost: a\r\norigin: " + origin + b"\r\ncontent-length: 0\r\n\r\n"

    async def story() -> None:
        async with proxy(gateway) as port:

            async def allowed(origin: bytes) -> dict[str, str]:
                gateway.answer = (500, b"text/plain", b"Internal Server Error")  # Serve's own
                status, headers, _ = await ask(port, call(origin))
                assert status == 503
                gateway.answer = None
                return {name: text for name, text in headers.items() if name.startswith(("access", "vary"))}

            assert await allowed(page) == {}
            gateway.allowed = page
            await ask(port, call(page))
            assert await allowed(page) == {
                "access-control-allow-origin": page.decode(),
                "access-control-expose-headers": "retry-after, x-request-id, x-should-retry",
                "vary": "origin",
            }
            assert await allowed(other) == {}
            gateway.allowed = b""  # the file names it no longer
            await ask(port, call(page))
            assert await allowed(page) == {}

    asyncio.run(story())


def test_no_number_of_origins_takes_memory_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "PAGES", 3)
    pages = edge.Pages()
    for number in (0, 1, 2, 0, 3):
        pages.learn(b"%d" % number, [(edge.ALLOW, b"*")])
    assert [number for number in range(4) if pages.headers(b"%d" % number)] == [0, 2, 3]
