"""What a client of the REST door does: one generation, with its steps as they happen.

Used by `spray generate --server` and by the demo. Programs use OpenAI's client, or anything that speaks HTTP.
"""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from workers.messages import StepEvent

NO_LIMIT = httpx.Timeout(10.0, read=None)


class ServerError(Exception):
    """The server refused or failed; the message is the server's own."""


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        image: the encoded file.
        seed: draws it again.
        metrics: layout and seconds by stage, as the server reports them.
    """

    image: bytes
    seed: int
    metrics: dict[str, Any]


def generate_remotely(server: str, body: dict[str, Any], on_step: Callable[[StepEvent], None]) -> list[Picture]:
    """Ask a server for pictures.

    Args:
        server: its base URL.
        body: fields of `POST /v1/images/generations`.
        on_step: called after each step.

    Raises:
        ServerError: it cannot be reached, refuses, or fails.
    """
    streamed = body | {"stream": True, "stream_options": {"include_progress": True}}
    pictures = []
    url = f"{server.rstrip('/')}/v1/images/generations"
    try:
        with httpx.stream("POST", url, json=streamed, timeout=NO_LIMIT, trust_env=False) as response:
            if response.status_code != 200:
                raise ServerError(_message(response.read(), response.status_code))
            for line in response.iter_lines():
                event = _event(line)
                if event is None:
                    continue
                if "error" in event:
                    raise ServerError(event["error"]["message"])
                if event["type"] == "image_generation.progress":
                    on_step(StepEvent(event["step"], event["total_steps"], event["seconds"]))
                elif event["type"] == "image_generation.completed":
                    pictures.append(Picture(base64.b64decode(event["b64_json"]), event["seed"], event["metrics"]))
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ServerError(f"no answer from {server}: {error}") from None
    if not pictures:
        raise ServerError(f"{server} ended the stream without a picture")
    return pictures


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
