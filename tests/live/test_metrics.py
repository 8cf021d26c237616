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
from prometheus_client.parser import text_string_to_metric_families

from deploy.families.qwen_image import FAMILY
from service.rollout.local_cluster import LocalCluster
from service.rollout.ports import bind_error
from tests.deploy.test_prometheus import FOLDER as RULES
from tests.support.deployments import deployment, model, ready
from tests.support.prometheus import answers, free_port, promtool, scraping
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

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(url: str) -> Samples:
    families = text_string_to_metric_families(httpx.get(url, timeout=30, trust_env=False).text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    """0 where nothing was observed yet."""
    return samples.get((name, frozenset(labels.items())), 0.0)


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if holds():
                return
        except httpx.TransportError:  # between two processes nobody answers
            pass
        time.sleep(0.2)
    raise AssertionError("it never came about")


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
    context = SimpleNamespace(rank=SimpleNamespace(rank=0))
    monkeypatch.setattr("workers.gang.gang.serve.get_replica_context", lambda: context)
    gang = Gang(spec.fixed)
    metrics_at = {"host": "127.0.0.1", "port": None}
    metrics = GangMetrics("renumbered", "1")
    gang._setup = Setup(spec, AdapterSync(()), FAMILY, None, contextvars.copy_context(), metrics_at, metrics)
    gang._setup.metrics.now(5.0, True, 1.0)
    gang._ranks = SimpleNamespace(renumber=told.append, serve_metrics=lambda **where: None)  # type: ignore[assignment]
    configured = {"model": spec.live, "storage": {}, "metrics": metrics_at}
    for _ in range(2):  # the second time nothing has changed
        asyncio.run(gang.reconfigure(configured))
    assert told == ["0"]
    gang._setup.metrics.now(7.0, True, 2.0)
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
        assert rank._metrics is not None
        rank._metrics.memory(used=8, peak=9, limit=10)
    labels = [each | {"rank": "0", "kind": "peak"} for each in labels]
    assert [str(sample("spray_rank_memory_bytes", each)) for each in labels] == ["9.0", "nan"]


def test_what_requests_leave_behind(demo_model: Path, tmp_path: Path) -> None:
    """Counts and seconds of two requests and a refused one are, to the last bit, those that the caller was told."""
    body = {"model": "demo", "prompt": "a", "size": "64x48"}
    with LocalCluster(deployment(model(demo_model, ulysses_degree=2))) as cluster:
        ready(cluster)
        url = f"{cluster.url}/v1/images/generations"
        told = [httpx.post(url, json=body, timeout=300, trust_env=False).json()["metrics"] for _ in range(2)]
        refused = httpx.post(url, json=body | {"size": "72x64"}, timeout=300, trust_env=False)
        assert refused.status_code == 400  # by the ranks: the deployment allows multiples of 8, the model of 16
        samples: Samples = {}

        def settled() -> bool:
            samples.update(scrape(cluster.metrics_url))
            gangs = value(samples, "spray_gangs", model="demo", state="running")
            wanted = value(samples, "spray_gangs_wanted", model="demo", reason="fixed")
            return gangs == wanted == 1 and value(samples, "spray_requests_in_flight", model="demo") == 0

        until(settled)
        check_with_prometheus(tmp_path, cluster.metrics_url, told)
        complaints = promtool("check", "metrics", given=httpx.get(cluster.metrics_url, trust_env=False).text)
    assert complaints == ""
    check_steps(samples, told)
    check_traffic(samples)
    check_requests(samples, told)
    check_of_the_node(samples)


def check_with_prometheus(folder: Path, metrics_url: str, told: list[dict[str, Any]]) -> None:
    """A real one sees the same: each rank's steps, and what callers were told, from a node that is up."""
    steps = sum(sum(metrics["step_seconds"]) for metrics in told)
    with scraping(folder, httpx.URL(metrics_url).port or 80, RULES / "rules.yml") as url:

        def number(question: str) -> float:
            found = answers(url, question)
            return float(found[0]["value"][1]) if found else 0.0

        until(lambda: number("up") == 1)
        assert number("sum(spray_step_seconds_count)") == 2 * 2 * 4  # ranks x requests x steps
        assert number('sum(spray_step_seconds_sum{rank="0"})') == pytest.approx(steps, rel=1e-9)
        until(lambda: bool(answers(url, "spray:backlog_seconds:per_capacity")))  # the rules have run
        assert not answers(url, 'ALERTS{alertstate="firing"}')


def check_steps(samples: Samples, told: list[dict[str, Any]]) -> None:
    for rank in "01":
        here = {"model": "demo", "replica": "0", "rank": rank}
        of_step = here | {"layout": "ulysses_degree=2", "shape": "64x48"}
        assert value(samples, "spray_step_seconds_count", **of_step) == 8
        assert value(samples, "spray_stage_seconds_count", **here, stage="denoise") == 2
        used, peak, limit = (
            value(samples, "spray_rank_memory_bytes", **here, kind=kind) for kind in ("used", "peak", "limit")
        )
        assert 1e8 < used <= peak < limit
    first = {"model": "demo", "replica": "0", "rank": "0"}
    steps = [seconds for metrics in told for seconds in metrics["step_seconds"]]
    of_step = first | {"layout": "ulysses_degree=2", "shape": "64x48"}
    assert value(samples, "spray_step_seconds_sum", **of_step) == pytest.approx(sum(steps), rel=1e-9)
    gang = {"model": "demo", "replica": "0"}
    assert value(samples, "spray_steps_total", **gang) == 8  # of the gang, not of each rank
    assert value(samples, "spray_pixels_total", **gang) == 2 * 64 * 48
    assert value(samples, "spray_prompt_tokens_total", **gang) > 2


def check_traffic(samples: Samples) -> None:
    """Two ranks trade heads for tokens: each sends something in each step, and one of them waits for the other."""
    waited = []
    for rank in "01":
        here = {"model": "demo", "replica": "0", "rank": rank}
        for op in ("all_to_all", "gather"):
            assert value(samples, "spray_collective_seconds_count", **here, op=op) == 8
            assert value(samples, "spray_collective_bytes_total", **here, op=op) > 0
        assert ("spray_collective_bytes_total", frozenset((here | {"op": "ring"}).items())) not in samples
        assert value(samples, "spray_straggler_seconds_count", **here) == 8
        waited.append(value(samples, "spray_straggler_seconds_sum", **here))
        in_collectives = sum(
            value(samples, "spray_collective_seconds_sum", **here, op=op) for op in ("all_to_all", "gather")
        )
        steps = here | {"layout": "ulysses_degree=2", "shape": "64x48"}
        assert waited[-1] <= in_collectives < value(samples, "spray_step_seconds_sum", **steps)
    assert sum(waited) > 0


def check_requests(samples: Samples, told: list[dict[str, Any]]) -> None:
    first = {"model": "demo", "replica": "0", "rank": "0"}
    of = {"encode": ("encode", "prepare"), "decode": ("decode",), "encode_media": ("encode_media",)}
    for name, stages in of.items():
        seconds = sum(metrics[f"{name}_seconds"] for metrics in told)
        observed = sum(value(samples, "spray_stage_seconds_sum", **first, stage=stage) for stage in stages)
        assert observed == pytest.approx(seconds, rel=1e-9)
    assert value(samples, "spray_requests_total", model="demo", outcome="ok") == 2
    assert value(samples, "spray_requests_total", model="demo", outcome="invalid_value") == 1
    assert value(samples, "spray_request_seconds_count", model="demo") == 2
    outside = ("encode_seconds", "decode_seconds", "encode_media_seconds")
    computed = sum(sum(metrics["step_seconds"]) + sum(metrics[stage] for stage in outside) for metrics in told)
    whole = value(samples, "spray_request_seconds_sum", model="demo")
    queued = value(samples, "spray_stage_seconds_sum", model="demo", replica="", rank="", stage="queue")
    assert whole == pytest.approx(computed + queued, rel=1e-9)
    route = "/v1/images/generations"
    assert value(samples, "spray_api_requests_total", route=route, code="200", key="") == 2
    assert value(samples, "spray_api_requests_total", route=route, code="400", key="") == 1
    assert value(samples, "spray_api_seconds_count", route=route) == 3


def check_of_the_node(samples: Samples) -> None:
    for phase in ("fetch", "process", "rendezvous", "load", "self_test", "warm_up"):
        assert value(samples, "spray_gang_start_seconds_count", model="demo", phase=phase) == 1, phase
    died = {"model": "demo", "reason": "died"}
    assert ("spray_gang_restarts_total", frozenset(died.items())) in samples  # from the start: 0, not nothing
    assert value(samples, "spray_gangs_wanted", model="demo", reason="fixed") == 1
    assert [value(samples, "spray_gangs_limit", model="demo", bound=bound) for bound in ("min", "max")] == [1, 1]
    gang = {"model": "demo", "replica": "0"}
    assert value(samples, "spray_capacity_seconds", **gang) == 1
    assert abs(value(samples, "spray_progress_timestamp_seconds", **gang) - time.time()) < 600
    for folder in ("models", "outputs", "metrics"):
        free, size = (value(samples, f"spray_disk_{what}_bytes", folder=folder) for what in ("free", "size"))
        assert 0 < free < size
