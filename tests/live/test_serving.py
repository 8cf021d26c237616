"""The whole road on a real local cluster: REST in, pictures out, on gangs of 1, 2, 3 and 4 ranks."""

import asyncio
import base64
import concurrent.futures
import functools
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from service.rollout.local_cluster import LocalCluster
from sp_core.attention.region_attention import attention_kept_local
from tests.support.deployments import (
    deployment,
    in_each_forward,
    model,
    on_rank,
    pixels,
    rank_statuses,
    ready,
    wait_for,
    wait_while,
)
from tests.support.fuzz import Judged, fire, serving
from tests.support.fuzz_requests import shots
from tests.support.listeners import Address, listeners, process_tree

LAYOUTS: dict[str, dict[str, int]] = {
    "demo-1": {},
    "demo-2": {"ulysses_degree": 2},
    "demo-3": {"ulysses_degree": 3},
    "demo-4": {"ulysses_degree": 2, "tensor_parallel_size": 2},
}


@pytest.fixture(scope="module")
def listened_before() -> set[tuple[Address, int]]:
    """Where this process and its children listened before the cluster: the ranks of other tests do."""
    return listeners(process_tree(os.getpid()))


@pytest.fixture(scope="module")
def server(demo_model: Path, listened_before: set[tuple[Address, int]]) -> Iterator[str]:
    models = [model(demo_model, name, **degrees) for name, degrees in LAYOUTS.items()]
    with LocalCluster(deployment(*models)) as cluster:
        ready(cluster)
        yield cluster.url


def generate(server: str, **body: Any) -> httpx.Response:
    body = {"model": "demo-2", "prompt": "a cup of coffee", "seed": 7} | body
    return httpx.post(f"{server}/v1/images/generations", json=body, timeout=300, trust_env=False)


def picture(answer: httpx.Response) -> np.ndarray[Any, np.dtype[np.int16]]:
    assert answer.status_code == 200, answer.text
    return pixels(answer.json()["data"][0]["b64_json"])


def test_one_seed_is_one_picture_on_every_layout(server: str) -> None:
    reference = picture(generate(server, model="demo-1"))
    assert reference.shape == (48, 64, 3)
    for name, degrees in LAYOUTS.items():
        answer = generate(server, model=name)
        layout = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items()) or "1 rank"
        assert answer.json()["metrics"]["layout"] == layout
        assert np.abs(picture(answer) - reference).max() <= 1
    assert np.abs(picture(generate(server, seed=8)) - reference).max() > 100


def test_nothing_listens_beyond_loopback(server: str, listened_before: set[tuple[Address, int]]) -> None:
    """Serve's replicas would open a port on all interfaces where anybody may run code."""
    found = listeners(process_tree(os.getpid())) - listened_before
    assert len(found) > len(LAYOUTS)  # at least a port of each gang
    assert {str(address) for address, _ in found if not address.is_loopback} == set()


def test_a_picture_has_the_same_bytes_each_way(server: str) -> None:
    drawn = base64.b64decode(generate(server).json()["data"][0]["b64_json"])
    file = generate(server, response_format="file")
    assert (file.headers["content-type"], file.headers["x-seed"]) == ("image/png", "7")
    url = generate(server, response_format="url").json()["data"][0]["url"]
    assert url.startswith(f"{server}/v1/outputs/")
    fetched = httpx.get(url, trust_env=False)
    stream = generate(server, stream=True).text.splitlines()
    (event,) = (json.loads(line[6:]) for line in stream if line.startswith("data: {"))
    form = httpx.post(
        f"{server}/v1/images/generations",
        files={"model": (None, "demo-2"), "prompt": (None, "a cup of coffee"), "seeds[]": (None, "7")},
        timeout=300,
        trust_env=False,
    )
    by_form = base64.b64decode(form.json()["data"][0]["b64_json"])
    assert drawn == file.content == fetched.content == base64.b64decode(event["b64_json"]) == by_form
    part = httpx.get(url, headers={"range": "bytes=8-15"}, trust_env=False)
    assert (part.status_code, part.content) == (206, drawn[8:16])
    for wrong, status in ((f"{url}0", 403), (url.partition("?")[0], 403)):
        answer = httpx.get(wrong, trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, "forbidden")
    assert generate(server, seeds=[7], prompt="another cup").content != drawn


def test_every_answer_has_one_id_and_the_description_is_there(server: str) -> None:
    for path, status in (("/openapi.json", 200), ("/docs", 200), ("/health", 200), ("/v1/models", 200), ("/v2", 404)):
        answer = httpx.get(f"{server}{path}", headers={"x-request-id": "mine"}, trust_env=False)
        assert (answer.status_code, answer.headers.get_list("x-request-id")) == (status, ["mine"])
        assert len(httpx.get(f"{server}{path}", trust_env=False).headers["x-request-id"]) == 32
    eta = httpx.get(f"{server}/v1/models/demo-2", trust_env=False).json()["eta_seconds"]
    assert eta is None or eta > 0


def test_openai_client(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    drawn = client.images.generate(model="demo-2", prompt="a cup of coffee", size="64x96", extra_body={"seed": 7})
    assert drawn.data is not None
    (image,) = drawn.data
    assert Image.open(io.BytesIO(base64.b64decode(image.b64_json or ""))).size == (64, 96)
    assert image.model_extra == {"seed": 7}
    assert [m.id for m in client.models.list()] == list(LAYOUTS)
    assert client.models.retrieve("demo-3").id == "demo-3"
    with pytest.raises(openai.BadRequestError, match="size 63x64 is not allowed") as refused:
        client.images.generate(model="demo-2", prompt="a", size="63x64")  # type: ignore[call-overload]
    assert refused.value.param == "size"
    with pytest.raises(openai.NotFoundError, match="available: demo-1"):
        client.images.generate(model="nope", prompt="a")


def test_openai_stream(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    events = list(client.images.generate(model="demo-2", prompt="a cup of coffee", stream=True, extra_body={"seed": 7}))
    assert [event.type for event in events] == ["image_generation.completed"]
    reference = picture(generate(server))
    assert np.array_equal(pixels(events[0].b64_json), reference)
    *previews, last = client.images.generate(
        model="demo-2", prompt="a cup of coffee", stream=True, partial_images=2, extra_body={"seed": 7}
    )
    assert last.b64_json == events[0].b64_json
    assert [preview.type for preview in previews] == ["image_generation.partial_image"] * 2
    assert [pixels(preview.b64_json).shape for preview in previews] == [reference.shape] * 2


def test_progress_events(server: str) -> None:
    body = {"model": "demo-2", "prompt": "a", "stream": True, "stream_options": {"include_progress": True}}
    with httpx.stream("POST", f"{server}/v1/images/generations", json=body, timeout=300, trust_env=False) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    steps = [(event["step"], event["total_steps"]) for event in events[:-1]]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(events[-1]["metrics"]["step_seconds"]) == 4


def test_several_pictures_and_formats(server: str) -> None:
    answer = generate(server, n=2, output_format="jpeg", output_compression=80, quality="high")
    assert answer.headers["x-ignored-params"] == "quality"
    data = answer.json()["data"]
    assert [image["seed"] for image in data] == [7, 8]
    assert all(Image.open(io.BytesIO(base64.b64decode(i["b64_json"]))).format == "JPEG" for i in data)
    alone = picture(generate(server, seed=8))
    assert np.abs(picture(generate(server, n=2)) - alone).max() > 100
    second = pixels(generate(server, n=2).json()["data"][1]["b64_json"])
    assert np.abs(second - alone).max() <= 1


def test_a_seed_is_drawn_and_returned(server: str) -> None:
    first, second = generate(server, seed=None), generate(server, seed=None)
    seeds = [answer.json()["data"][0]["seed"] for answer in (first, second)]
    assert seeds[0] != seeds[1]
    assert np.array_equal(picture(generate(server, seed=seeds[0])), picture(first))


def test_what_only_the_model_can_refuse_leaves_the_gang_sound(server: str) -> None:
    before = [status.pid for status in rank_statuses("demo-2")]
    answer = generate(server, size="72x64")  # the deployment allows multiples of 8, the model only of 16
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "size")
    assert answer.json()["error"]["message"] == "width must be a multiple of 16, got 72"
    assert generate(server, prompt="{" * 20_000).status_code == 200  # more than the encoder takes: cut, not refused
    assert [status.pid for status in rank_statuses("demo-2")] == before


def dawdle(slow: Path) -> None:
    """So long that a request of many steps outlasts the news that its caller has left, on any machine."""
    if slow.exists():
        time.sleep(0.2)


@pytest.mark.parametrize("computing", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_frees_all_ranks(server: str, stream: bool, computing: bool, tmp_path: Path) -> None:
    (slow := tmp_path / "slow").touch()
    on_rank("demo-2", 1, in_each_forward, functools.partial(dawdle, slow))
    before = rank_statuses("demo-2")
    long = {"model": "demo-2", "prompt": "a", "num_inference_steps": 100, "stream": stream}
    with socket.create_connection(("127.0.0.1", int(server.rpartition(":")[2]))) as caller:
        body = json.dumps(long).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        caller.sendall(head.encode() + body)
        if computing:
            wait_for(lambda: rank_statuses("demo-2")[0].progress, lambda progress: progress > before[0].progress + 3)
    assert generate(server, num_inference_steps=1).status_code == 200  # its turn is after the other's
    wait_for(lambda: {status.phase for status in rank_statuses("demo-2")}, lambda phases: phases == {"idle"})
    slow.unlink()
    stopped = rank_statuses("demo-2")
    passed = [now.progress - then.progress for now, then in zip(stopped, before, strict=True)]
    assert passed[0] == passed[1] < 100, "the request ran to its end"
    assert generate(server).status_code == 200
    assert [status.pid for status in rank_statuses("demo-2")] == [status.pid for status in before]


def test_a_full_queue_is_said_so(server: str, tmp_path: Path) -> None:
    (held := tmp_path / "held").touch()
    on_rank("demo-1", 0, in_each_forward, functools.partial(wait_while, held))
    with concurrent.futures.ThreadPoolExecutor(8) as callers:
        try:
            asked = [callers.submit(generate, server, model="demo-1") for _ in range(8)]
            wait_for(lambda: any(each.done() for each in asked), bool)  # nobody is answered meanwhile, only refused
        finally:
            held.unlink()
        answers = [each.result() for each in asked]
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 120  # by the estimate


def local_attention(actor: Any, local: bool) -> None:
    """In a rank's process: keep its attention to its own tokens, or put that right again."""
    if local:
        actor.control = attention_kept_local()
        actor.control.__enter__()
    else:
        actor.control.__exit__(None, None, None)


def test_attention_kept_local_would_be_seen(server: str) -> None:
    reference = picture(generate(server))
    for rank in range(2):
        on_rank("demo-2", rank, local_attention, True)
    assert np.abs(picture(generate(server)) - reference).max() > 100
    for rank in range(2):
        on_rank("demo-2", rank, local_attention, False)
    assert np.array_equal(picture(generate(server)), reference)


def test_probes(server: str) -> None:
    assert httpx.get(f"{server}/livez", timeout=60, trust_env=False).json() == {"status": "ok"}
    ready = httpx.get(f"{server}/readyz", timeout=60, trust_env=False)
    assert (ready.status_code, ready.json()["waiting_for"]) == (200, [])


def test_command_line_client(server: str, tmp_path: Path) -> None:
    output = tmp_path / "cup.webp"
    command = ["generate", "a cup of coffee", "--server", server, "--model", "demo-2", "--seed", "7"]
    run = subprocess.run(
        [sys.executable, "-m", "service.cli.main", *command, "--num-inference-steps=3", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode, run.stdout) == (0, f"{output}\n"), run.stderr
    assert "step 3/3" in run.stderr
    assert "seeds: 7" in run.stderr
    assert Image.open(output).format == "WEBP"


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_passes_is_said_and_frees_the_gang(server: str, stream: bool, tmp_path: Path) -> None:
    """Serve's proxy knows the header too: it would cut the answer off, and ask for another try."""
    (slow := tmp_path / "slow").touch()
    on_rank("demo-1", 0, in_each_forward, functools.partial(dawdle, slow))
    body = {"model": "demo-1", "prompt": "a", "num_inference_steps": 50, "stream": stream}
    headers = {"x-request-timeout-seconds": "2"}
    try:
        began = time.monotonic()
        answer = httpx.post(f"{server}/v1/images/generations", json=body, headers=headers, timeout=120, trust_env=False)
        assert time.monotonic() - began >= 2
    finally:
        slow.unlink()
    if stream:
        assert answer.status_code == 200
        assert json.loads(answer.text.split("data: ")[-1])["error"]["code"] == "deadline_exceeded"
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"
    assert generate(server, model="demo-1").status_code == 200


def test_two_hundred_wrong_requests_leave_no_mark(server: str) -> None:
    """Ten thousand, and memory, are in tests/live/test_fuzz.py."""
    sent, judged = shots(200, seed=2, description=None), Judged()
    before = serving(os.getpid())
    assert {name for name, _ in before} == {"proxy", "gateway", "gang", "rank"}
    asyncio.run(fire(server, sent, judged))
    assert judged.faults == []
    assert judged.statuses.total() == 200
    assert (len(judged.pictures), judged.pictures.total()) == (1, 4)
    assert serving(os.getpid()).keys() == before.keys()
