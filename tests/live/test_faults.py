"""A rank dies, stops or raises in the middle of a forward: no request is lost, nothing but its gang restarts.

Prints the seconds from the fault to the answer of the request that was in flight.
"""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
import torch

from service.cli.client import read_cluster
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import (
    PING_S,
    deployment,
    in_each_forward,
    model,
    on_gang,
    on_rank,
    pid_of,
    pixels,
    rank_statuses,
    ready,
    wait_for,
    wait_while,
)
from workers.gang import watch

pytestmark = pytest.mark.fault

MOST_STARTS = 10
"""What a lost rank may cost, in starts of a process with the libraries of a rank: about two and a half on a quiet
machine. Seconds would say how busy the machine is."""

MOST_STARTS_OF_A_PROXY = 6
"""The same for a lost proxy, which takes one and a half; with Serve's own period it would be more than eight."""

NOTICED_S = 3.0
"""Within which a stopped rank is to be noticed, at the pace of the looks at it."""

REQUEST = {"model": "struck", "prompt": "a cup of coffee", "seed": 7, "num_inference_steps": 6}


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[str]:
    struck, bystander = model(demo_model, "struck", ulysses_degree=2), model(demo_model, "bystander")
    bystander = bystander.model_copy(update={"spare_ranks": True})
    with LocalCluster(deployment(struck, bystander)) as cluster:
        ready(cluster)
        yield cluster.url


def generate(server: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server}/v1/images/generations", json=REQUEST | body, timeout=PING_S + 60, trust_env=False)


def strike(actor: Any, fault: str, after: Path | None = None) -> None:
    """In the rank's process: let the fault happen inside the fourth forward from now, once a file is gone."""
    forwards = 0

    def count() -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 4:
            if after is not None:
                wait_while(after)
            if fault == "raise":
                raise ValueError("struck")
            if fault == "out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            os.kill(os.getpid(), getattr(signal, fault))

    in_each_forward(actor, count)


def importing_s() -> float:
    """What a new process takes here and now to import what a rank imports."""
    began = time.monotonic()
    imports = "from workers.gang.rank_process import import_rank; import_rank(False)"
    subprocess.run([sys.executable, "-c", imports], check=True)
    return time.monotonic() - began


def gateway_pid() -> int:
    return pid_of("SERVE_REPLICA::gateway#")


def hold(actor: Any, calm: Path) -> None:
    """In the rank's process: let every forward wait while a file is there."""
    in_each_forward(actor, lambda: wait_while(calm))


def wait_ended(pids: list[int]) -> None:
    """Killed processes are there until their parent looks."""
    wait_for(lambda: [pid for pid in pids if Path(f"/proc/{pid}").exists()], lambda alive: not alive)


def seen(server: str, name: str = "struck") -> dict[str, Any]:
    """A model in `GET /v1/cluster`."""
    return next(each for each in read_cluster(server)["models"] if each["id"] == name)


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP", "raise"])
def test_a_struck_rank_costs_seconds_and_no_request(server: str, fault: str, capsys: Any) -> None:
    reference = pixels(generate(server).json()["data"][0]["b64_json"])
    ranks = [status.pid for status in rank_statuses("struck")]
    others = [gateway_pid(), *(status.pid for status in rank_statuses("bystander"))]
    on_rank("struck", 1, strike, fault)

    began = time.monotonic()
    answer = generate(server)
    seconds = time.monotonic() - began
    with capsys.disabled():
        print(f" {fault}: the request in flight was answered after {seconds:.1f} s;", end="")
    assert seconds < MOST_STARTS * importing_s(), "the fault was noticed by patience, or its ranks start slowly"

    assert answer.status_code == 200, answer.text
    assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), reference)
    wait_ended(ranks)
    assert [gateway_pid(), *(status.pid for status in rank_statuses("bystander"))] == others
    assert generate(server).status_code == 200


def test_too_little_memory_is_the_requests_fault(server: str) -> None:
    """It is answered at once and tried nowhere else. One rank goes on; of several the others may wait, so all go."""
    alone = rank_statuses("bystander")[0].pid
    on_rank("bystander", 0, strike, "out of memory")
    answer = generate(server, model="bystander")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "out_of_memory"), answer.text
    assert answer.json()["error"]["message"] == (
        "'bystander' has too little memory for 64x48: ask for fewer pixels, frames or pictures"
    )
    assert answer.headers["x-should-retry"] == "false"
    assert generate(server, model="bystander").status_code == 200
    assert rank_statuses("bystander")[0].pid == alone

    ranks = [status.pid for status in rank_statuses("struck")]
    on_rank("struck", 1, strike, "out of memory")
    answer = generate(server)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "out_of_memory"), answer.text
    wait_ended(ranks)
    assert generate(server).status_code == 200


def spare_pid() -> int:
    """The process that waits beside the bystander's rank, once it has imported its libraries."""

    def spare_ones() -> list[Any]:
        named = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith("bystander-")]
        actors = [ray.get_actor(each["name"], namespace=each["namespace"]) for each in named]
        statuses = ray.get([each.status.remote() for each in actors], timeout=120)
        return [each for each, status in zip(actors, statuses, strict=True) if status.rank == -1]

    (spare,) = wait_for(spare_ones, bool)
    return int(ray.get(spare.__ray_call__.remote(lambda _: os.getpid()), timeout=120))  # behind its imports


def test_a_spare_process_takes_the_place_of_a_lost_one(server: str, capsys: Any) -> None:
    """Twice: the next spare one is made beside it. It saves what a new process takes to import."""
    reference = pixels(generate(server, model="bystander").json()["data"][0]["b64_json"])

    def kill(*pids: int) -> float:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        answer = generate(server, model="bystander")
        assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), reference)
        return time.monotonic() - began

    saved = []
    for _ in range(2):
        waiting = spare_pid()
        saved.append(kill(rank_statuses("bystander")[0].pid))
        assert [status.pid for status in rank_statuses("bystander")] == [waiting]
    importing = importing_s()
    new = kill(spare_pid(), rank_statuses("bystander")[0].pid)
    importing = max(importing, importing_s())
    with capsys.disabled():
        print(
            f" a spare rank serves after {min(saved):.1f} s, a new one after {new:.1f} s; imports {importing:.1f} s;",
            end="",
        )
    assert min(saved) < importing, "it has imported after the loss"
    assert 1.5 * min(saved) < new


def test_a_stopped_rank_is_noticed_within_seconds(server: str, capsys: Any) -> None:
    """Idle, when it owes nobody an answer. Counted in looks, since a busy machine looks less often."""

    def count(_: Any) -> None:  # in the gang's process; inside this test, so that it does not import this file
        sound, looks = watch.is_halted, Counter[int]()

        def is_halted(pid: int) -> bool:
            with contextlib.suppress(OSError):  # it is gone
                looks[pid] += Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
            return sound(pid)

        watch.is_halted, watch.stopped_looks = is_halted, looks  # type: ignore[attr-defined]

    on_gang("struck", count)
    stopped = rank_statuses("struck")[1].pid
    os.kill(stopped, signal.SIGSTOP)
    wait_ended([stopped])
    looks = on_gang("struck", lambda _: watch.stopped_looks[stopped])  # type: ignore[attr-defined]
    with capsys.disabled():
        print(f" a stopped rank is noticed by look {looks};", end="")
    assert 1 <= looks <= NOTICED_S / watch.PERIOD_S
    assert generate(server).status_code == 200


def test_requests_that_wait_are_answered_as_well(server: str, tmp_path: Path) -> None:
    reference = pixels(generate(server).json()["data"][0]["b64_json"])
    (calm := tmp_path / "calm").touch()
    on_rank("struck", 0, strike, "SIGKILL", calm)
    before = rank_statuses("struck")[0].progress
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        try:
            asked = [callers.submit(generate, server)]
            wait_for(lambda: rank_statuses("struck")[0].progress, lambda progress: progress > before)
            asked += [callers.submit(generate, server) for _ in range(3)]
            wait_for(lambda: seen(server)["queued"], lambda waiting: waiting == 3)  # the queue is full
        finally:
            calm.unlink()
        answers = [answer.result() for answer in asked]
    assert [answer.status_code for answer in answers] == [200] * 4, [answer.text[:200] for answer in answers]
    for answer in answers:
        assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), reference)


def test_a_failure_between_steps_is_the_requests_own(server: str) -> None:
    """An exception while a request is prepared is agreed by all ranks: the caller hears of it, the gang goes on."""
    ranks = [status.pid for status in rank_statuses("struck")]
    on_rank("struck", 1, break_scheduler)
    answer = generate(server)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
    assert "struck scheduler" in answer.json()["error"]["message"]
    assert "Traceback" not in answer.text
    on_rank("struck", 1, mend_scheduler)
    assert generate(server).status_code == 200
    assert [status.pid for status in rank_statuses("struck")] == ranks


def break_scheduler(actor: Any) -> None:
    def set_timesteps(self: Any, sigmas: Any = None, **_: Any) -> None:
        raise ArithmeticError("struck scheduler")

    type(actor._rank._loaded.pipeline.scheduler).sound = type(actor._rank._loaded.pipeline.scheduler).set_timesteps
    type(actor._rank._loaded.pipeline.scheduler).set_timesteps = set_timesteps


def mend_scheduler(actor: Any) -> None:
    type(actor._rank._loaded.pipeline.scheduler).set_timesteps = type(actor._rank._loaded.pipeline.scheduler).sound


def test_a_killed_gateway_is_said_in_the_envelope(server: str, tmp_path: Path) -> None:
    (calm := tmp_path / "calm").touch()
    on_rank("bystander", 0, hold, calm)
    before = rank_statuses("bystander")[0].progress
    with concurrent.futures.ThreadPoolExecutor(1) as callers:
        try:
            asked = callers.submit(generate, server, model="bystander")
            wait_for(lambda: rank_statuses("bystander")[0].progress, lambda progress: progress > before)
            os.kill(gateway_pid(), signal.SIGKILL)
            answer = asked.result()
        finally:
            calm.unlink()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5"), answer.text
    assert answer.json()["error"]["code"] == "gateway_lost"
    wait_for(lambda: answers(server), lambda status: status == 200)
    assert generate(server, model="bystander").status_code == 200


def test_a_killed_proxy_comes_back(server: str, capsys: Any) -> None:
    """Within 5 s on an idle machine; 27 with Serve's own period."""
    os.kill(pid_of("SERVE_PROXY_ACTOR-"), signal.SIGKILL)
    began = time.monotonic()
    wait_for(lambda: answers(server), lambda status: status == 0)
    wait_for(lambda: answers(server), lambda status: status == 200)
    seconds = time.monotonic() - began
    with capsys.disabled():
        print(f" proxy SIGKILL: answers again after {seconds:.1f} s;", end="")
    assert seconds < MOST_STARTS_OF_A_PROXY * importing_s()
    assert generate(server).status_code == 200


def answers(server: str) -> int:
    """The status of a health check; 0 if nobody answers."""
    try:
        return httpx.get(f"{server}/livez", timeout=5, trust_env=False).status_code
    except httpx.TransportError:
        return 0


def test_a_gang_whose_own_process_dies_is_placed_anew(server: str) -> None:
    pid = pid_of("model-struck#")
    ranks = [status.pid for status in rank_statuses("struck")]
    os.kill(pid, signal.SIGKILL)
    assert generate(server).status_code == 200
    wait_ended(ranks)


def test_a_killed_controller_fails_no_request(server: str) -> None:
    """Of two callers that ask all the time: before, meanwhile, and once there is another one."""
    answered: list[int] = []
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            answered.append(generate(server, model="bystander").status_code)

    def controller() -> int:
        try:
            return pid_of("SERVE_CONTROLLER_ACTOR")
        except ray.exceptions.RayError:  # it starts again
            return 0

    struck = controller()
    with concurrent.futures.ThreadPoolExecutor(2) as callers:
        asking = [callers.submit(ask) for _ in range(2)]
        try:
            wait_for(lambda: len(answered), lambda count: count >= 4)
            os.kill(struck, signal.SIGKILL)
            wait_for(controller, lambda pid: pid not in (0, struck))
            meanwhile = len(answered)
            wait_for(lambda: len(answered), lambda count: count >= meanwhile + 20)
        finally:
            enough.set()
        for each in asking:
            each.result()
    assert set(answered) == {200}
