"""A gang begins the next request while the pictures of the last are encoded, and no answer is lost meanwhile."""

import concurrent.futures
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from ray import serve

from service.cli.client import read_cluster
from service.names import GANG, app_name
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import (
    PING_S,
    deployment,
    model,
    on_rank,
    pixels,
    rank_statuses,
    ready,
    wait_for,
    wait_while,
)
from workers.messages import Begun, GenerationRequest

Future = concurrent.futures.Future[httpx.Response]

HELD, BROKEN = "a picture that takes long to encode", "a picture that cannot be encoded"


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[str]:
    with LocalCluster(deployment(model(demo_model, ulysses_degree=2))) as cluster:
        ready(cluster)
        yield cluster.url


@pytest.fixture(scope="module")
def callers() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        yield pool


def generate(server: str, prompt: str) -> httpx.Response:
    body = {"model": "demo", "prompt": prompt, "seed": 7}
    return httpx.post(f"{server}/v1/images/generations", json=body, timeout=PING_S, trust_env=False)


def picture(answer: httpx.Response) -> np.ndarray[Any, np.dtype[np.int16]]:
    assert answer.status_code == 200, answer.text
    return pixels(answer.json()["data"][0]["b64_json"])


def hold_encoder(_: Any, there: Path) -> None:
    """In the process of rank 0: let the encoder wait with one prompt while a file exists, and fail with another."""
    from workers.gang import encoding

    encode = encoding.encode

    def slow(made: Any, request: Any, number: int) -> bytes:
        if request.prompt == BROKEN:
            raise ValueError("no such color")
        if request.prompt == HELD:
            wait_while(there)
        return encode(made, request, number)

    encoding.encode = slow


def phase(server: str) -> str:
    (shown,) = read_cluster(server)["models"]
    return str(shown["gangs"][0]["now"]["phase"]) if shown["gangs"] else ""


def pids() -> list[int]:
    return [status.pid for status in rank_statuses("demo")]


@contextlib.contextmanager
def held(server: str, callers: concurrent.futures.Executor, there: Path) -> Iterator[Future]:
    """Ask for a picture; inside, it is being encoded, until the file is gone."""
    there.touch()
    try:
        on_rank("demo", 0, hold_encoder, there)
        asked = callers.submit(generate, server, HELD)
        wait_for(lambda: phase(server), lambda now: now == "encode_media")
        yield asked
    finally:
        there.unlink(missing_ok=True)


def test_the_next_request_steps_before_the_last_is_answered(
    server: str, callers: concurrent.futures.ThreadPoolExecutor, tmp_path: Path
) -> None:
    reference = picture(generate(server, HELD))
    body = {"model": "demo", "prompt": "a fox", "stream": True, "stream_options": {"include_progress": True}}
    url = f"{server}/v1/images/generations"
    with (
        held(server, callers, tmp_path / "held") as asked,
        httpx.stream("POST", url, json=body, timeout=PING_S, trust_env=False) as answer,
    ):
        events = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {"))
        assert next(events)["step"] == 1
        assert not asked.done()
        (tmp_path / "held").unlink()
        assert [*events][-1]["metrics"]["encode_media_seconds"] > 0
    assert np.array_equal(picture(asked.result()), reference)
    assert asked.result().json()["metrics"]["encode_media_seconds"] > 0


def read_late(server: str) -> int:
    """In a process of its own, since the router of a handle goes on for as long as its process: pictures that came."""
    gang = serve.get_deployment_handle(GANG, app_name("demo")).options(stream=True)
    request = GenerationRequest("late", "demo", "a cup", 64, 48, 1, seed=7)
    reports = iter(gang.generate.remote(request))
    assert isinstance(next(reports), Begun)
    wait_for(lambda: phase(server), lambda now: now == "idle")
    wait_for(lambda: rank_statuses("demo")[0].phase, lambda now: now == "idle")
    time.sleep(1)  # it is drawn, encoded, and known to the gang
    (answer,) = reports
    return len(ray.get(answer.result, timeout=60).outputs)


def test_a_gateway_that_reads_late_finds_its_pictures(server: str) -> None:
    gateway = ray.remote(num_cpus=0, max_calls=1)(read_late)
    assert ray.get(gateway.remote(server), timeout=PING_S) == 1


def test_a_picture_that_cannot_be_encoded_fails_alone(
    server: str, callers: concurrent.futures.ThreadPoolExecutor, tmp_path: Path
) -> None:
    before = pids()
    with held(server, callers, tmp_path / "held") as asked:
        broken = callers.submit(generate, server, BROKEN)
    answer = broken.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed"), answer.text
    assert "encoding failed: ValueError: no such color" in answer.json()["error"]["message"]
    assert asked.result().status_code == 200
    assert pids() == before


def test_a_rank_that_is_killed_while_it_encodes_loses_nothing(
    server: str, callers: concurrent.futures.ThreadPoolExecutor, tmp_path: Path
) -> None:
    reference = picture(generate(server, HELD))
    with held(server, callers, tmp_path / "held") as asked:
        before = pids()
        os.kill(before[0], signal.SIGKILL)
        assert np.array_equal(picture(asked.result()), reference)
    wait_for(pids, lambda now: len(now) == 2 and not set(now) & set(before))


def note_its_end(_: Any, file: Path) -> None:
    """In the process of the gang: make a file when Serve has told it to end."""
    from workers.gang.rank_group import RankGroup

    answered = RankGroup.answered

    def noted(self: RankGroup) -> Any:
        file.touch()
        return answered(self)

    RankGroup.answered = noted  # type: ignore[method-assign]


def test_a_gang_that_ends_answers_before(
    server: str, callers: concurrent.futures.ThreadPoolExecutor, tmp_path: Path
) -> None:
    """The last test: the model is gone afterwards."""
    reference, ends = picture(generate(server, HELD)), tmp_path / "ends"
    (name,) = (a for a in ray.util.list_named_actors(all_namespaces=True) if "model-demo#" in a["name"])
    gang = ray.get_actor(name["name"], namespace=name["namespace"])
    ray.get(gang.__ray_call__.remote(note_its_end, ends), timeout=120)
    with held(server, callers, tmp_path / "held") as asked:
        deleted = callers.submit(serve.delete, app_name("demo"))
        wait_for(lambda: (ends.exists(), asked.done()), any)
        assert not asked.done()
    assert np.array_equal(picture(asked.result()), reference)
    deleted.result()
