"""A client of the REST API, for the commands and the demo. SPRAY_API_KEY holds its API key.

Fields of a request come in; pictures, a video or a JSON body come out. Programs use OpenAI's client instead, or any
other that speaks HTTP.
"""

import base64
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from workers.messages import StepEvent

PICTURES, VIDEOS = "/v1/images/generations", "/v1/videos/sync"

NO_LIMIT = httpx.Timeout(10.0, read=None)


DEFAULT_SERVER = "http://127.0.0.1:8000"


def server_url(given: str | None) -> str:
    """The base URL of the server: the given one, else SPRAY_SERVER, else the default."""
    return given or os.environ.get("SPRAY_SERVER") or DEFAULT_SERVER


class ServerError(Exception):
    """The server refused or failed, and the message is its own; or it did not answer."""


@dataclass(frozen=True)
class Generated:
    """A finished picture or video.

    Attributes:
        content: the encoded file.
        seed: draws the same again.
        metrics: its layout and the seconds of each stage, as the server reports them.
    """

    content: bytes
    seed: int
    metrics: dict[str, Any]


def generate_remotely(
    server: str, body: dict[str, Any], on_step: Callable[[StepEvent], None], path: str = PICTURES
) -> list[Generated]:
    """Generate pictures or a video on a server.

    Args:
        server: its base URL.
        body: the fields of the path.
        on_step: called after each step.
        path: of the API, `PICTURES` or `VIDEOS`.

    Raises:
        ServerError: it cannot be reached, refuses, or fails.
    """
    streamed = body | {"stream": True, "stream_options": {"include_progress": True}}
    made = []
    url = f"{server.rstrip('/')}{path}"
    try:
        with httpx.stream(
            "POST", url, json=streamed, headers=_authorization(), timeout=NO_LIMIT, trust_env=False
        ) as response:
            if response.status_code != 200:
                raise ServerError(_message(response.read(), response.status_code))
            for line in response.iter_lines():
                event = _event(line)
                if event is None:
                    continue
                if "error" in event:
                    raise ServerError(event["error"]["message"])
                if event["type"].endswith(".progress"):
                    on_step(StepEvent(event["step"], event["total_steps"], event["seconds"]))
                elif event["type"].endswith(".completed"):
                    made.append(Generated(base64.b64decode(event["b64_json"]), event["seed"], event["metrics"]))
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ServerError(f"no answer from {server}: {error}") from None
    if not made:
        raise ServerError(f"{server} ended the stream without a result")
    return made


def read_cluster(server: str) -> dict[str, Any]:
    """The body of `GET /v1/cluster`.

    Raises:
        ServerError: it cannot be reached, or refuses.
    """
    return _read(server, "/v1/cluster")


def read_models(server: str) -> dict[str, Any]:
    """The body of `GET /v1/models`.

    Raises:
        ServerError: it cannot be reached, or refuses.
    """
    return _read(server, "/v1/models")


def _read(server: str, path: str) -> dict[str, Any]:
    try:
        response = httpx.get(f"{server.rstrip('/')}{path}", headers=_authorization(), timeout=30, trust_env=False)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ServerError(f"no answer from {server}: {error}") from None
    if response.status_code != 200:
        raise ServerError(_message(response.content, response.status_code))
    body: dict[str, Any] = response.json()
    return body


def _authorization() -> dict[str, str]:
    key = os.environ.get("SPRAY_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def _event(line: str) -> dict[str, Any] | None:
    payload = line.removeprefix("data: ")
    if payload == line or payload == "[DONE]":
        return None
    event: dict[str, Any] = json.loads(payload)
    return event


def _message(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}: {body[:200].decode(errors='replace')}"
