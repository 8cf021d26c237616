"""Jobs of a server, for the commands: submits, lists, follows and fetches them, by `service.cli.client`."""

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx

from service.cli.client import (
    NO_LIMIT,
    VIDEOS,
    NoAnswer,
    ServerError,
    answering,
    ask,
    authorization,
    refusal,
    understood,
)
from service.jobs.records import ENDED
from workers.messages import StepEvent

VIDEO_JOBS = "/v1/videos"

AGAIN_S = 1.0
"""Seconds between two streams of one job: a gateway that stops ends its streams."""

PASSES = ("jobs_unavailable", "shutting_down", "queue_full", "rate_limit_exceeded")
"""Codes of errors in a stream after which it is asked for again."""

SILENT_S = 30.0
"""After which a stream is given up that says nothing: a gateway gives a sign of life every five seconds."""

PATIENCE_S = 300.0
"""How long a job is asked for again that was there, while the server does not answer or has no room."""


def submit_job(server: str, body: dict[str, Any], path: str) -> dict[str, Any]:
    """Let a server make pictures or a video as a job.

    Args:
        server: its base URL.
        body: the fields of the path.
        path: the path that makes the same at once: `PICTURES`, `EDITS` or `VIDEOS`.

    Raises:
        ServerError: it cannot be reached, or refuses.
    """
    headers = {b"idempotency-key": uuid.uuid4().hex.encode()}  # to ask again must not make a second job
    if path == VIDEOS:
        path = VIDEO_JOBS
    else:
        headers[b"prefer"] = b"respond-async"
    try:
        return ask(server, path, "POST", body, headers, NO_LIMIT)  # it reads a clip before it answers
    except NoAnswer:
        time.sleep(AGAIN_S)
        return ask(server, path, "POST", body, headers, NO_LIMIT)


def read_jobs(server: str, limit: int) -> dict[str, Any]:
    """The body of `GET /v1/jobs`, with at most `limit` jobs.

    Raises:
        ServerError: it cannot be reached, or refuses.
    """
    return ask(server, f"/v1/jobs?{urlencode({'limit': limit})}")


def read_job(server: str, job_id: str) -> dict[str, Any]:
    """The body of `GET /v1/jobs/{id}`.

    Raises:
        ServerError: it cannot be reached, refuses, or has no such job of this caller.
    """
    return ask(server, f"/v1/jobs/{job_id}")


def cancel_job(server: str, job_id: str) -> dict[str, Any]:
    """End a job; returns the job afterwards.

    Raises:
        ServerError: it cannot be reached, refuses, or has no such job of this caller.
    """
    return ask(server, f"/v1/jobs/{job_id}/cancel", "POST")


def follow_job(server: str, job_id: str, on_step: Callable[[StepEvent], None]) -> dict[str, Any]:
    """Wait until a job has ended; returns the ended job.

    Args:
        server: its base URL.
        job_id: of the job.
        on_step: called after progress, with the mean seconds of the steps since the last call.

    Raises:
        ServerError: it cannot be reached, refuses, or has no such job of this caller.
    """
    step, since = 0, time.monotonic()
    heard, failing_since = False, math.inf
    while True:
        try:
            for job in _events(server, job_id):
                heard, failing_since = True, math.inf
                with understood(server, "GET /v1/jobs/ID/events"):
                    now, done, ended = time.monotonic(), int(job["step"]), job["state"] in ENDED
                    if done > step:
                        on_step(StepEvent(done, int(job["total_steps"]), (now - since) / (done - step)))
                    step, since = done, now
                if ended:
                    return job
        except ServerError as error:
            failing_since = min(failing_since, time.monotonic())
            mistaken = isinstance(error, NoAnswer) and not heard  # the address may be wrong
            if mistaken or not error.again or time.monotonic() - failing_since >= PATIENCE_S:
                raise
        time.sleep(AGAIN_S)


def _events(server: str, job_id: str) -> Iterator[dict[str, Any]]:
    """The job of each event of its stream, until the stream ends."""
    with (
        answering(server),
        httpx.stream(
            "GET",
            f"{server.rstrip('/')}/v1/jobs/{job_id}/events",
            headers=authorization(),
            timeout=httpx.Timeout(10.0, read=SILENT_S),
            trust_env=False,
        ) as response,
    ):
        if response.status_code != 200:
            raise refusal(response.read(), response.status_code)
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            with understood(server, "GET /v1/jobs/ID/events"):
                event = json.loads(line.removeprefix("data: "))
                error = event.get("error")
                if not error:
                    job = dict(event["job"])
            if error:
                raise ServerError(str(error["message"]), error.get("code"), error.get("code") in PASSES)
            yield job


def check_made(job: dict[str, Any], more: str = "") -> None:
    """Raise the error of a job that has made nothing.

    Args:
        job: the job.
        more: added to the error.

    Raises:
        ServerError: it has not succeeded.
    """
    if job["state"] != "succeeded":
        error = job["error"]
        raise ServerError(f"the job is {job['state']}" + (f": {error['message']}" if error else "") + more)


def save_outputs(server: str, job: dict[str, Any], first: Path) -> Iterator[tuple[Path, int]]:
    """Save the files of a job that has succeeded as FIRST, FIRST-1, FIRST-2; gives the path and the seed of each then.

    Raises:
        ServerError: the server cannot be reached, or refuses.
        OSError: a file cannot be written.
    """
    with understood(server, "GET /v1/jobs/ID"):
        job_id, files = str(job["id"]), [(int(each["index"]), int(each["seed"])) for each in job["outputs"]]
    for index, seed in files:
        file = first.with_stem(f"{first.stem}-{index}") if index else first
        download_output(server, job_id, index, file)
        yield file, seed


def download_output(server: str, job_id: str, index: int, to: Path) -> None:
    """Save one file of a job; it is there whole, or not at all.

    Args:
        server: its base URL.
        job_id: of the job.
        index: the index of the file.
        to: the path to write.

    Raises:
        ServerError: it cannot be reached, refuses, or ends before the file does.
        OSError: it cannot be written.
    """
    url = f"{server.rstrip('/')}/v1/jobs/{job_id}/content?index={index}"
    part = to.with_name(f"{to.name}.part")
    try:
        with (
            answering(server),
            httpx.stream("GET", url, headers=authorization(), timeout=NO_LIMIT, trust_env=False) as response,
        ):
            if response.status_code != 200:
                raise refusal(response.read(), response.status_code)
            with part.open("wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
        part.replace(to)
    finally:
        part.unlink(missing_ok=True)
