"""What Prometheus reads: exact numbers from all processes of a node, from one port, whichever of them dies."""

import asyncio
import contextvars
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import prometheus_client
import pytest
from ray.serve.schema import ReplicaRank

from deploy.families.qwen_image import FAMILY
from service.rollout.ports import bind_error
from tests.support.deployments import model
from tests.support.prometheus import free_port
from tests.support.scraped import scrape, until, value
from workers import exporter
from workers.exporter import Exporter
from workers.gang.adapter_sync import AdapterSync
from workers.gang.gang import Gang, Setup
from workers.gang.rank import Rank
from workers.gang.rank_group import RankGroup
from workers.observing import GangMetrics

PROCESS = """
import sys, time
from workers.exporter import Exporter, share_values
from workers.observing import GatewayMetrics
exporter = Exporter(share_values())
metrics = GatewayMetrics("m", ["ok"])
for request in range(int(sys.argv[1])):
    metrics.began()
    metrics.began()
    metrics.ended("ok")
exporter.serve_at("127.0.0.1", int(sys.argv[2]))
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[[int, int], subprocess.Popen[str]]]:
    """Starts processes of one node and cluster, each with some requests; `start(requests, port)`."""
    running = []
    env = os.environ | {"RAY_RAYLET_PID": "1", "SPRAY_METRICS_DIR": str(tmp_path / "metrics")}

    def start(requests: int, port: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROCESS, str(requests), str(port)]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_one_port_answers_for_all_processes_and_outlives_each(
    processes: Callable[[int, int], subprocess.Popen[str]], tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/metrics"
    alive = {requests: processes(requests, port) for requests in (1, 20, 300)}
    while alive:
        until(lambda: value(scrape(url), "spray_requests_in_flight", model="m") == sum(alive))
        with ThreadPoolExecutor(8) as scrapers:  # at once, also in the moment when one has died
            counted = [
                value(each, "spray_requests_total", model="m", outcome="ok")
                for each in scrapers.map(scrape, [url] * 16)
            ]
        assert set(counted) == {321}
        assert len(list((tmp_path / "metrics").glob("*.db"))) <= 4 * len(alive) + 2  # those of the dead are kept in two
        requests, process = next(iter(alive.items()))  # the first came first to the port
        process.send_signal(signal.SIGKILL)
        process.wait()
        del alive[requests]
    with pytest.raises(httpx.TransportError):
        scrape(url)


def test_a_folder_that_cannot_be_used_costs_the_metrics_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    env = os.environ | {"RAY_RAYLET_PID": "1", "SPRAY_METRICS_DIR": str(tmp_path / "file")}
    work = """
from workers.exporter import Exporter, share_values
from workers.observing import RankMetrics
folder = share_values()
RankMetrics("m", "0", 0).step(1.0, "1M")
Exporter(folder).serve_at("127.0.0.1", 1)
print(folder)
"""
    run = subprocess.run([sys.executable, "-c", work], env=env, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, "None\n"), run.stderr
    assert "this process exports no metrics" in run.stderr


def test_a_port_of_another_program_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporter, "RETRY_S", 0.02)
    said: list[str] = []
    logger = SimpleNamespace(warning=lambda message, *values: said.append(message % values))
    monkeypatch.setattr(exporter, "logger", logger)
    port, other = free_port(), free_port()
    with socket.create_server(("127.0.0.1", port)):
        mine = Exporter(tmp_path)
        mine.serve_at("127.0.0.1", port)
        until(lambda: bool(said))
        time.sleep(0.5)
        assert said == [f"metrics: this node cannot answer at 127.0.0.1:{port}: Address already in use"]
    until(lambda: scrape(f"http://127.0.0.1:{port}/metrics") is not None)  # it has become free
    mine.serve_at("127.0.0.1", other)
    until(lambda: scrape(f"http://127.0.0.1:{other}/metrics") is not None)
    until(lambda: not bind_error("127.0.0.1", port))
    mine.serve_at("127.0.0.1", None)
    until(lambda: not bind_error("127.0.0.1", other))


def test_ranks_answer_where_no_gang_does(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, tuple[Any, ...]]] = []
    statuses: list[Any] = [SimpleNamespace(node_id=node) for node in ("here", "there")]
    ranks = []
    for node in ("here", "there"):
        remote = functools.partial(lambda node, *where: told.append((node, where)), node)
        ranks.append(SimpleNamespace(serve_metrics=SimpleNamespace(remote=remote)))
    group = RankGroup(model(Path("/nowhere")), ranks, statuses, {}, on_lost=lambda kind: None)
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr("workers.gang.rank_group.ray.get_runtime_context", lambda: context)
    group.serve_metrics("0.0.0.0", 9464)
    assert told == [("there", ("0.0.0.0", 9464))]


def test_the_labels_follow_when_serve_numbers_gangs_anew(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model(demo_model, "renumbered")
    told: list[str] = []
    gang = Gang(spec.fixed)
    metrics_at = {"host": "127.0.0.1", "port": None}
    metrics = GangMetrics("renumbered", "1")
    setup = Setup(spec, AdapterSync(()), FAMILY, None, contextvars.copy_context(), metrics_at, metrics)
    setup.metrics.now(5.0, True, 1.0)
    ranks = SimpleNamespace(renumber=told.append, serve_metrics=lambda **where: None, answering=False)
    gang._set_up(setup).ranks = ranks  # type: ignore[assignment]
    configured = {"model": spec.live, "storage": {}, "metrics": metrics_at}
    for _ in range(2):  # the second time nothing has changed
        asyncio.run(gang.reconfigure(configured, rank=ReplicaRank(rank=0, node_rank=0, local_rank=0)))
    assert told == ["0"]
    setup.metrics.now(7.0, True, 2.0)
    sample = prometheus_client.REGISTRY.get_sample_value
    labels = [{"model": "renumbered", "replica": replica} for replica in "01"]
    for name, now in (("backlog_seconds", 7.0), ("capacity_seconds", 1.0), ("progress_timestamp_seconds", 2.0)):
        assert [str(sample(f"spray_{name}", each)) for each in labels] == [str(now), "nan"]  # which is not exported
    monkeypatch.setattr(
        "workers.gang.rank.torch.set_num_threads", lambda threads: None
    )  # of this process, for all tests
    rank = Rank(0, spec, replica="1")
    for replica in "10":
        rank.renumber(replica)
        assert rank.telemetry.metrics is not None
        rank.telemetry.metrics.memory(used=8, peak=9, limit=10)
    labels = [each | {"rank": "0", "kind": "peak"} for each in labels]
    assert [str(sample("spray_rank_memory_bytes", each)) for each in labels] == ["9.0", "nan"]
