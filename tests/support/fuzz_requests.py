"""Requests that nobody should send, as bytes for a connection. For `tests.support.fuzz`, which sends and judges them.

Bodies are made by hypothesis, and by schemathesis from the API's own description; the rest breaks HTTP itself. A seed
makes the same requests again.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from service.api.bodies import ImageGenerationBody, VideoGenerationBody

PICTURES = "/v1/images/generations"
PATHS = (PICTURES, "/v1/videos/sync")
MODEL = "demo-2"
"""The model that is asked; it draws."""

CUP = {"model": MODEL, "prompt": "a cup of coffee", "size": "64x64", "num_inference_steps": 1, "seed": 7}
ROUTES = ("/livez", "/readyz", "/health", "/v1/models", "/v1/cluster", "/openapi.json", "/docs")


@dataclass(frozen=True)
class Shot:
    """What is written to one connection.

    Attributes:
        kind: of mistake; `picture` is none.
        parts: what is written, piece by piece.
        pause_s: between the pieces.
        leaves: the client closes when all is written, without reading.
        heard: only the request as a whole is wrong, so that there must be an answer in the envelope.
    """

    kind: str
    parts: tuple[bytes, ...]
    pause_s: float = 0.0
    leaves: bool = False
    heard: bool = True


def head(method: str, path: str, headers: dict[str, str] | None = None, length: int | None = None) -> bytes:
    """The head of a request. The server closes the connection after its answer."""
    lines = {"host": "127.0.0.1", "connection": "close"} | (headers or {})
    if length is not None:
        lines["content-length"] = str(length)
    text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    return text.encode("latin-1", errors="replace")


def post(body: bytes, kind: str, path: str = PICTURES, **more: str) -> bytes:
    """A whole request with a body of this type."""
    return head("POST", path, {"content-type": kind} | more, len(body)) + body


JSON = "application/json"
FORM = "multipart/form-data; boundary=b"


def picture(number: int) -> Shot:
    """A request that is right, in one of the ways to ask: every one of them has the same bytes."""
    body = CUP | (
        {"response_format": "file"}, {"stream": True}, {"response_format": "url"}, {}
    )[number % 4]  # fmt: skip
    return Shot("picture", (post(json.dumps(body).encode(), JSON),))


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40) | st.sampled_from(
        ["", "auto", "0x0", "64x64", "9" * 400, "-1", "1e999", "null", "b64_json", "url", MODEL, "\ud800", "\0"]
    ) | st.sampled_from([2**31, 2**53, 2**63, -1, 10**400, 1e308])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip
FIELDS = sorted({*ImageGenerationBody.model_fields, *VideoGenerationBody.model_fields, "extra_body", "image", "mask"})
BODIES = st.builds(
    lambda base, changed: base | changed,
    st.sampled_from([{}, CUP]),
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=12), VALUES, max_size=4),
)
SETTINGS: dict[str, Any] = {
    "database": None, "deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck),
}  # fmt: skip


def made(strategy: Any, count: int, seed: int) -> list[Any]:
    """About so many values of a strategy, the same for the same seed."""
    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, **SETTINGS)
    @hypothesis.given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found[:count]


def bodies(count: int, seed: int) -> Iterator[Shot]:
    """Bodies in JSON with values that fields do not have, and maybe with some that they have."""
    chance = random.Random(seed)
    for body in made(BODIES | VALUES, count, seed):
        text = json.dumps(body, ensure_ascii=chance.random() < 0.5).encode("utf-8", errors="surrogatepass")
        yield Shot("json", (post(text, JSON, chance.choice(PATHS)),))


def described(count: int, seed: int, description: dict[str, Any]) -> Iterator[Shot]:
    """Requests by the API's own description, right and wrong."""
    schema = schemathesis.openapi.from_dict(description)
    modes = schemathesis.GenerationMode
    for path in PATHS:
        for mode in (modes.POSITIVE, modes.NEGATIVE):
            for case in made(schema[path]["POST"].as_strategy(generation_mode=mode), count // 4, seed):
                told = case.as_transport_kwargs(base_url="http://127.0.0.1")
                sent = requests.Request(**{k: v for k, v in told.items() if k != "cookies"}).prepare()
                body = sent.body if isinstance(sent.body, bytes) else (sent.body or "").encode()
                headers = {str(k): str(v) for k, v in sent.headers.items() if str(k).lower() != "content-length"}
                headers["Connection"] = "close"
                lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                start = f"{sent.method} {sent.path_url} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
                yield Shot("described", ((start + lines + "\r\n").encode("latin-1", errors="replace") + body,))


def form(chance: random.Random) -> Shot:
    """A form that is broken somewhere."""
    fields = [("prompt", "a cup"), ("size", "64x64"), ("num_inference_steps", "1"), ("seed", "7")]
    name = chance.choice(["lora[name]", "seeds[]", "a[b][c][d][e]", "[", "prompt", "image", "é\x00", "x" * 5000, ""])
    fields.append((name, chance.choice(["1", "[1,2", "{}", "\x00" * 50, "é" * 400, "null"])))
    chance.shuffle(fields)
    lines = [f'--b\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields]
    lines *= chance.choice([1, 1, 1, 40])
    body = ("".join(lines) + "--b--\r\n").encode(chance.choice(["utf-8", "utf-16", "utf-8"]))
    mistake = chance.randrange(6)
    kind = FORM
    if mistake == 0:
        body = body[: chance.randrange(len(body))]
    elif mistake == 1:
        kind = chance.choice(
            ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=é"]
        )
    elif mistake == 2:
        at = chance.randrange(len(body))
        body = body[:at] + chance.randbytes(30) + body[at:]
    elif mistake == 3:
        kind = FORM + "; charset=" + chance.choice(["utf-16", "latin-1", "none-such", "utf_8_sig", '"'])
    elif mistake == 4:
        body = body.replace(b'form-data; name="', b'form-data; filename="../../etc/passwd"; name="', 3)
    return Shot("form", (post(body, kind, chance.choice(PATHS)),))


def truncated(chance: random.Random) -> Shot:
    """A body that ends early: the client leaves."""
    whole = post(json.dumps(CUP).encode(), JSON)
    return Shot("truncated", (whole[: chance.randrange(1, len(whole))],), leaves=True, heard=False)


def slow(chance: random.Random) -> Shot:
    """A body that is wrong, and comes byte by byte."""
    whole = post(json.dumps(CUP | {"n": 0}).encode(), JSON)
    size = chance.randrange(4, 40)
    return Shot(
        "slow", tuple(whole[i : i + size] for i in range(0, len(whole), size)), chance.choice([0.0, 0.01, 0.05])
    )


def huge_head(chance: random.Random) -> Shot:
    """Headers that are long, or many. Those above 64 KiB close the connection."""
    size = chance.choice([1000, 30_000, 70_000, 300_000])
    headers = chance.choice(
        [{"x-long": "a" * size}, {f"x-{i}": "b" * 20 for i in range(size // 30)}, {"x-request-id": "c" * size},
         {"authorization": "Bearer " + "d" * size}, {"content-type": "e" * size}, {"cookie": "f=" + "g" * size}]
    )  # fmt: skip
    body = json.dumps(CUP | {"n": 0}).encode()
    return Shot("headers", (head("POST", PICTURES, headers, len(body)) + body,), heard=size < 60_000)


def strange(chance: random.Random) -> Shot:
    """What HTTP does not allow, or hardly."""
    body = json.dumps(CUP | {"n": 0}).encode()
    wrong = [
        b"\r\n\r\n\r\n", b"\x00" * 100, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET /livez HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        head("POST", PICTURES, {"content-length": "-5"}), head("POST", PICTURES, {"content-length": "9" * 40}),
        head("POST", PICTURES, {"transfer-encoding": "chunked"}) + b"zz\r\n" + body,
        head("POST", PICTURES, {"transfer-encoding": "chunked", "content-length": "5"}) + b"0\r\n\r\n",
        head("POST", PICTURES, {"transfer-encoding": "gzip"}) + body,
        head("POST", PICTURES, {"upgrade": "websocket", "connection": "upgrade", "sec-websocket-version": "13"}),
        chance.randbytes(chance.randrange(1, 2000)),
    ]  # fmt: skip
    return Shot("strange", (chance.choice(wrong),), heard=False)


def odd_path(chance: random.Random) -> Shot:
    """Other paths and methods, and names that nothing has."""
    name = chance.choice(
        ["%00", "..%2f..%2fetc%2fpasswd", "%ff%fe", "é", "a" * 3000, "%F0%9F%98%80", "x.png", "//", MODEL]
    )
    path = chance.choice([
        f"/v1/models/{name}", f"/v1/outputs/{name}", f"/v1/outputs/{name}?expires=9999999999&signature={name}",
        f"/{name}", f"/v1/{name}", "/v1/outputs/a.png?expires=" + "9" * 500, *ROUTES, *PATHS, f"//{name}",
        "/v1//models",
    ])  # fmt: skip
    method = chance.choice(["GET", "GET", "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "FOO"])
    headers = chance.choice(
        [{}, {"range": "bytes=5-1,9-"}, {"if-none-match": "*"}, {"host": "a" * 300}, {"accept": "\x7f"}]
    )
    return Shot(
        "path",
        (head(method, path, headers),),
        heard=method != "HEAD" and "é" not in path,
    )


def odd_body(chance: random.Random) -> Shot:
    """Bodies that are no JSON, or more than that."""
    long = b" " * (1 << 20)
    body = chance.choice([
        b"", b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", b"NaN",
        b"\xff\xfe{\x00}\x00", b'{"prompt": "\\ud800"}', b'{"prompt": "a", "prompt": 5}', b"{" + long + b"}",
        long + long, json.dumps({str(i): i for i in range(5000)}).encode(), b'{"prompt": "' + b"a" * 40_000 + b'"}',
        chance.randbytes(500), b'{"prompt": "a", "extra_body": "{\\"extra_body\\": {}}"}', b'{"__proto__": 1}',
    ])  # fmt: skip
    kind = chance.choice(
        [JSON, JSON, JSON, "application/json; charset=utf-16", "text/plain", "", "application/x-www-form-urlencoded"]
    )
    more = chance.choice([{}, {}, {"content-encoding": "gzip"}, {"expect": "100-continue"}])
    return Shot("body", (post(body, kind, chance.choice(PATHS), **more),), heard=kind != "")


def leaver(chance: random.Random) -> Shot:
    """A request that is right, from a client that leaves at once or after a moment."""
    body = CUP | {"num_inference_steps": 4, "stream": chance.random() < 0.5, "seed": chance.randrange(10**6)}
    whole = post(json.dumps(body).encode(), JSON)
    parts = (whole,) if chance.random() < 0.5 else (whole, b"")
    return Shot("leaver", parts, chance.choice([0.01, 0.1, 0.4]), leaves=True, heard=False)


WEIGHTS: dict[Callable[[random.Random], Shot], int] = {
    form: 20, truncated: 15, slow: 8, huge_head: 10, strange: 15, odd_path: 20, odd_body: 20, leaver: 4,
}  # fmt: skip


def shots(count: int, seed: int, description: dict[str, Any] | None) -> list[Shot]:
    """So many requests in random order; every fiftieth asks for a picture and is right.

    Args:
        count: how many.
        seed: makes the same again.
        description: what `/openapi.json` says; None leaves out requests by it.
    """
    chance = random.Random(seed)
    found = [*bodies(3 * count // 10, seed)]
    if description is not None:
        found += described(count // 5, seed, description)
    makers = chance.choices([*WEIGHTS], [*WEIGHTS.values()], k=max(0, count - len(found)))
    found += [make(chance) for make in makers]
    chance.shuffle(found)
    found[::50] = [picture(number) for number in range(len(found[::50]))]
    return found[:count]
