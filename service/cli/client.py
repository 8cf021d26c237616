"""A client of the REST API, for the commands and the demo. SPRAY_API_KEY holds its API key.

Fields of a request come in; pictures, a video or a JSON body come out. Programs use OpenAI's client instead, or any
other that speaks HTTP.
"""

import base64
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import httpx

from workers.messages import StepEvent

PICTURES: Final = "/v1/images/generations"
EDITS: Final = "/v1/images/edits"
VIDEOS: Final = "/v1/videos/sync"

USUAL_LIMIT = httpx.Timeout(30.0)

NO_LIMIT = httpx.Timeout(10.0, read=None)


DEFAULT_SERVER = "http://127.0.0.1:8000"


def server_url(given: str | None) -> str:
    """The base URL of the server: the given one, else SPRAY_SERVER, else the default."""
    return given or os.environ.get("SPRAY_SERVER") or DEFAULT_SERVER


class ServerError(Exception):
    """The server refused or failed, with its own message; or it did not answer.

    Args:
        message: in one line.
        code: the code of the server's error; None: it has none.
        again: whether the same call may succeed later.
    """

    def __init__(self, message: str, code: str | None = None, again: bool = False) -> None:
        super().__init__(message)
        self.code, self.again = code, again


class NoAnswer(ServerError):
    """The server cannot be reached, or has stopped to answer."""


@dataclass(frozen=True)
class Generated:
    """A finished picture or video.

    Attributes:
        content: the encoded file.
        seed: the seed that draws the same again.
        metrics: its layout and the seconds of each stage, as the server reports them.
        warnings: what the caller should know of the request, such as that its prompt was cut.
    """

    content: bytes
    seed: int
    metrics: dict[str, Any]
    warnings: tuple[str, ...] = ()


def generate_remotely(
    server: str,
    body: dict[str, Any],
    on_step: Callable[[StepEvent], None],
    path: str = PICTURES,
    on_preview: Callable[[bytes], None] = lambda picture: None,
) -> list[Generated]:
    """Generate pictures or a video on a server.

    Args:
        server: its base URL.
        body: the fields of the path.
        on_step: called after each step.
        path: the path of the API: `PICTURES`, `EDITS` or `VIDEOS`.
        on_preview: called with each preview, if the body asks for some.

    Raises:
        ServerError: it cannot be reached, refuses, fails, or is no server of spray.
    """
    streamed = body | {"stream": True, "stream_options": {"include_progress": True}}
    made = []
    with answering(server):
        url = f"{server.rstrip('/')}{path}"
        with httpx.stream(
            "POST", url, json=streamed, headers=authorization(), timeout=NO_LIMIT, trust_env=False
        ) as response:
            if response.status_code != 200:
                raise refusal(response.read(), response.status_code)
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise ServerError(f"{server} answered POST {path} with {kind or 'an untyped body'}, not with a stream")
            for line in response.iter_lines():
                with understood(server, f"POST {path}"):
                    told = _told(line)
                if isinstance(told, StepEvent):
                    on_step(told)
                elif isinstance(told, bytes):
                    on_preview(told)
                elif told is not None:
                    made.append(told)
    if not made:
        raise ServerError(f"{server} ended the stream without a result")
    return made


def read_cluster(server: str) -> dict[str, Any]:
    """The body of `GET /v1/cluster`.

    Raises:
        ServerError: it cannot be reached, or refuses.
    """
    return ask(server, "/v1/cluster")


def read_models(server: str) -> dict[str, Any]:
    """The body of `GET /v1/models`.

    Raises:
        ServerError: it cannot be reached, or refuses.
    """
    return ask(server, "/v1/models")


def read_model(server: str, name: str) -> dict[str, Any]:
    """The body of `GET /v1/models/{name}`.

    Raises:
        ServerError: it cannot be reached, refuses, or has no such model.
    """
    return ask(server, f"/v1/models/{quote(name)}")


def read_description(server: str) -> dict[str, Any]:
    """The body of `GET /openapi.json`.

    Raises:
        ServerError: it cannot be reached, or refuses.
    """
    return ask(server, "/openapi.json")


def read_requests(server: str) -> dict[str, Any]:
    """The body of `GET /v1/requests`.

    Raises:
        ServerError: it cannot be reached, or refuses.
    """
    return ask(server, "/v1/requests")


def cancel_request(server: str, request_id: str) -> dict[str, Any]:
    """End a request that waits or runs.

    Args:
        server: its base URL.
        request_id: the id of the request, or the x-request-id that it came with.

    Raises:
        ServerError: the server cannot be reached, or has no such request of this caller.
    """
    return ask(server, f"/v1/requests/{quote(request_id, safe='')}", "DELETE")


@contextlib.contextmanager
def understood(server: str, asked: str) -> Iterator[None]:
    """Read an answer inside this context: a missing field, or one of another type, becomes an error of the server.

    Args:
        server: its base URL.
        asked: method and path of the call.

    Raises:
        ServerError: the answer is not one of spray.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ServerError(f"{server} answered {asked}, but not as spray does: {_line(missing)}") from None


@contextlib.contextmanager
def answering(server: str) -> Iterator[None]:
    """Call a server inside this context.

    Raises:
        NoAnswer: it cannot be reached.
    """
    try:
        yield
    except (httpx.RequestError, httpx.InvalidURL, UnicodeError) as error:  # the last: no name of a host
        raise NoAnswer(f"no answer from {server}: {error}", again=True) from None


def ask(
    server: str,
    path: str,
    method: str = "GET",
    body: dict[str, Any] | None = None,
    headers: Mapping[bytes, bytes] = {},
    timeout: httpx.Timeout = USUAL_LIMIT,
) -> dict[str, Any]:
    """Call a server; returns the JSON object of its answer.

    Args:
        server: its base URL.
        path: the path of the call, with its query.
        method: the method of the call.
        body: a JSON object; None: no body.
        headers: further headers, besides the key.
        timeout: after which the server counts as gone.

    Raises:
        ServerError: it cannot be reached, refuses, or answers something else.
    """
    url = f"{server.rstrip('/')}{path}"
    with answering(server):
        sent = authorization() | dict(headers)
        response = httpx.request(method, url, json=body, headers=sent, timeout=timeout, trust_env=False)
    if not response.is_success:
        raise refusal(response.content, response.status_code)
    with understood(server, f"{method} {path}"):
        body = response.json()
        if not isinstance(body, dict):
            raise TypeError(f"expected an object, got {_line(response.text)}")
    return body


def authorization() -> dict[bytes, bytes]:
    """The header with the key. It is bytes, because a key may have any letters and httpx takes only ASCII text.

    Raises:
        ServerError: the key has a character that no header takes.
    """
    key = os.environ.get("SPRAY_API_KEY", "").strip()
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in key):
        raise ServerError("SPRAY_API_KEY has a control character, such as a line break; it holds one key and no more")
    return {b"authorization": b"Bearer " + os.fsencode(key)} if key else {}


def _told(line: str) -> StepEvent | bytes | Generated | None:
    """The content of a line of a stream: a step, a preview, a result, or None.

    Raises:
        ServerError: the request has failed.
        KeyError, TypeError, ValueError: the line is not one of spray.
    """
    payload = line.removeprefix("data: ")
    if payload == line or payload == "[DONE]":
        return None
    event = json.loads(payload)
    if "error" in event:
        raise ServerError(event["error"]["message"])
    if event["type"].endswith(".progress"):
        return StepEvent(int(event["step"]), int(event["total_steps"]), float(event["seconds"]))
    if event["type"].endswith(".partial_image"):
        return base64.b64decode(event["b64_json"])
    if event["type"].endswith(".completed"):
        warnings = tuple(map(str, event.get("warnings", ())))  # servers of an older version send none
        return Generated(base64.b64decode(event["b64_json"]), event["seed"], event["metrics"], warnings)
    return None


def refusal(body: bytes, status: int) -> ServerError:
    """The error that an answer with this status and body means."""
    again = status in (429, 502, 503)
    try:
        error = json.loads(body)["error"]
        return ServerError(str(error["message"]), error.get("code"), again)
    except (ValueError, KeyError, TypeError, AttributeError):
        return ServerError(f"HTTP {status}: {_line(body.decode(errors='replace'))}", again=again)


def _line(text: str) -> str:
    """The beginning of a text, in one line."""
    return " ".join(text.split())[:200]
