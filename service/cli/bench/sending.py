"""Sends one request of a load as a stream, and records its outcome. For `service.cli.bench.driving`."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import httpx

from service.cli.bench.load import Planned
from service.cli.client import ServerError, authorization

OK = "ok"
NO_ANSWER = "no_answer"
"""The connection failed, or ended before the answer did."""

TIMEOUT = "timeout"
"""The answer took longer than `--timeout`."""

UNREADABLE = "unreadable"
"""The answer is not one of this API."""

NO_RESULT = "no_result"
"""The stream ended well, but had no picture."""


@dataclass
class Outcome:
    """A request and its answer. Times are seconds.

    Attributes:
        kind: its name in the mix or the trace.
        at_s: when it was due, from the start of the load.
        sent_late_s: how much later it was sent.
        seconds: from when it was due to the end of its answer.
        code: `ok`, or the code of the error.
        message: of the error.
        first_step_s: from when it was due to the report of its first step.
        stages: seconds that the ranks spent: `encode`, `decode`, `files`.
        steps: seconds of each step, by the server.
    """

    kind: str
    at_s: float
    sent_late_s: float = 0.0
    seconds: float = 0.0
    code: str = OK
    message: str = ""
    first_step_s: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    @property
    def waited_s(self) -> float:
        """Seconds that are not work of the ranks: in the queue, on the way, and the lost work of lost ranks."""
        return max(0.0, self.seconds - sum(self.stages.values()) - sum(self.steps))


def client(server: str) -> httpx.AsyncClient:
    """A client without limits of its own, since these would hold requests back.

    Raises:
        ServerError: `server` is no URL.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    try:
        return httpx.AsyncClient(
            base_url=server.rstrip("/"), headers=authorization(), limits=limits, timeout=None, trust_env=False
        )
    except httpx.InvalidURL as error:
        raise ServerError(f"{server!r} is no URL: {error}") from None


async def send(http: httpx.AsyncClient, planned: Planned, began: float, due: float, timeout_s: float) -> Outcome:
    """Send one request and read its answer to the end.

    Args:
        http: from `client`.
        planned: what to send.
        began: when the load began, on the event loop's clock.
        due: when this request was due, on the same clock.
        timeout_s: seconds from now for the whole answer.
    """
    loop = asyncio.get_running_loop()
    outcome = Outcome(planned.kind, due - began, sent_late_s=loop.time() - due)
    try:
        async with asyncio.timeout(timeout_s), http.stream("POST", planned.path, json=planned.body) as response:
            if response.status_code != 200:
                _refused(outcome, await response.aread(), response.status_code)
            else:
                await _read(response, outcome, due)
    except TimeoutError:
        outcome.code = TIMEOUT
    except (httpx.TransportError, OSError) as error:
        outcome.code, outcome.message = NO_ANSWER, f"no answer from {http.base_url}: {error or type(error).__name__}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        outcome.code, outcome.message = UNREADABLE, f"the answer is not that of spray: {error!r}"
    outcome.seconds = loop.time() - due
    return outcome


async def _read(response: httpx.Response, outcome: Outcome, due: float) -> None:
    """Read the events of a stream into `outcome`."""
    outcome.code = NO_RESULT
    async for line in response.aiter_lines():
        if not line.startswith("data: {"):
            continue
        event: dict[str, Any] = json.loads(line[6:])
        if "error" in event:
            outcome.code, outcome.message = str(event["error"]["code"]), str(event["error"]["message"])
        elif event["type"].endswith(".progress"):
            if outcome.first_step_s is None:
                outcome.first_step_s = asyncio.get_running_loop().time() - due
        elif event["type"].endswith(".completed"):
            outcome.code = OK
            told = event["metrics"]
            outcome.steps = told["step_seconds"]
            outcome.stages = {
                "encode": told["encode_seconds"],
                "decode": told["decode_seconds"],
                "files": told["encode_media_seconds"],
            }


def _refused(outcome: Outcome, body: bytes, status: int) -> None:
    try:
        error = json.loads(body)["error"]
        outcome.code, outcome.message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        outcome.code, outcome.message = f"http_{status}", body[:200].decode(errors="replace")
