"""Elastic gangs against fixed degrees, for real: one gang of two ranks, two gangs of one, and an elastic one.

Called by `tests.benchmarks.elastic --live`. All three are models of one cluster, and have the same traffic one after
the other. Small pictures come often, large ones rarely; each has a deadline, which the gateway enforces. Then what a
change of ranks costs, and what an elastic gang costs where nothing changes: one whose requests always have both ranks
(`min_degree: 2`) against a fixed one, in turns.
"""

import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from deploy.gateway_spec import GatewaySpec
from deploy.model_sections import Autoscaling, Elastic
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, Metrics
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import model, ready
from workers.demo_models.writer import write_demo_model

SMALL = {"size": "128x128", "num_inference_steps": 8}
LARGE = {"size": "256x256", "num_inference_steps": 40}
LOAD = 0.6
"""Of what two gangs of one rank could do."""

LARGE_SHARE = 0.15
IN_TIME = 3.0
"""A request is in time within so many times what it takes alone on two ranks, and a second."""


class Asked(NamedTuple):
    """One request: whether it is large, whether it came in time, and its seconds."""

    large: bool
    in_time: bool
    seconds: float


def models(folder: Path) -> list[ModelSpec]:
    """One gang of two ranks, two of one, one elastic, and one that is elastic in name: its requests have both ranks."""
    free = {"max_queued": 200}
    return [
        model(folder, "fixed-2", ulysses_degree=2).model_copy(update=free),
        model(folder, "fixed-1").model_copy(update=free | {"autoscaling": Autoscaling(min_replicas=2, max_replicas=2)}),
        model(folder, "elastic", ulysses_degree=2).model_copy(update=free | {"elastic": Elastic()}),
        model(folder, "constant", ulysses_degree=2).model_copy(update=free | {"elastic": Elastic(min_degree=2)}),
    ]


def ask(url: str, name: str, request: dict[str, Any], seed: int, within_s: float | None = None) -> tuple[bool, float]:
    """Whether a picture came, and after how many seconds."""
    headers = {} if within_s is None else {"x-request-timeout-seconds": f"{within_s:.2f}"}
    body = {"model": name, "prompt": "a cup of coffee", "seed": seed, **request}
    began = time.monotonic()
    answer = httpx.post(f"{url}/v1/images/generations", json=body, headers=headers, timeout=600, trust_env=False)
    return answer.status_code == 200, time.monotonic() - began


def alone_s(url: str, name: str, request: dict[str, Any]) -> float:
    """What a request takes on an idle gang."""
    return statistics.median(ask(url, name, request, seed)[1] for seed in range(3))


def traffic(url: str, name: str, plan: list[tuple[float, bool]], limits: dict[bool, float]) -> list[Asked]:
    """Send what the plan says, at its moments."""

    def one(place: int, at: float, large: bool) -> Asked:
        time.sleep(max(0.0, began + at - time.monotonic()))
        got, seconds = ask(url, name, LARGE if large else SMALL, place, limits[large])
        return Asked(large, got and seconds <= limits[large], seconds)

    with ThreadPoolExecutor(len(plan)) as threads:
        began = time.monotonic()
        return list(threads.map(one, range(len(plan)), *zip(*plan, strict=True)))


def measure(seconds: float, seed: int, pairs: int) -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "demo"
        write_demo_model(folder, "qwen-image")
        spec = DeploymentSpec(
            models=tuple(models(folder)), gateway=GatewaySpec(port=0, grpc_port=None), metrics=Metrics(port=None)
        )
        with LocalCluster(spec) as cluster:
            ready(cluster)
            for name in ("fixed-2", "fixed-1", "elastic", "constant"):
                for request in (SMALL, LARGE):
                    ask(cluster.url, name, request, 0)
            compare(cluster.url, seconds, seed)
            overhead(cluster.url, pairs)


def compare(url: str, seconds: float, seed: int) -> None:
    """The same traffic for each."""
    one = {large: alone_s(url, "fixed-1", request) for large, request in ((False, SMALL), (True, LARGE))}
    two = {large: alone_s(url, "fixed-2", request) for large, request in ((False, SMALL), (True, LARGE))}
    limits = {large: IN_TIME * two[large] + 1.0 for large in two}
    draw, now, plan = random.Random(seed), 0.0, []
    mean_s = (1 - LARGE_SHARE) * one[False] + LARGE_SHARE * one[True]
    while now < seconds:
        plan.append((now, draw.random() < LARGE_SHARE))
        now += draw.expovariate(LOAD * 2 / mean_s)
    print(
        f"alone on one rank: small {one[False]:.2f} s, large {one[True]:.2f} s; "
        f"on two: {two[False]:.2f} and {two[True]:.2f}"
    )
    print("| policy | requests | in time | small in time | large in time | small p95 s | large p95 s | in time / s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("fixed-2", "fixed-1", "elastic"):
        began = time.monotonic()
        found = traffic(url, name, plan, limits)
        took_s = time.monotonic() - began
        cells = [f"{_share(found):.2f}", *(f"{_share([a for a in found if a.large == large]):.2f}" for large in limits)]
        cells += [f"{_p95([a.seconds for a in found if a.large == large]):.1f}" for large in limits]
        rate = sum(each.in_time for each in found) / took_s
        print(f"| {name} | {len(found)} | {' | '.join(cells)} | {rate:.2f} |", flush=True)


def overhead(url: str, pairs: int) -> None:
    """One caller, both ranks at all times: an elastic gang against a fixed one, in turns. And what a change costs."""
    ratios = []
    for pair in range(pairs):
        order = ("fixed-2", "constant") if pair % 2 else ("constant", "fixed-2")
        took = {name: ask(url, name, LARGE, pair)[1] for name in order}
        ratios.append(took["constant"] / took["fixed-2"])
    spread = statistics.quantiles(ratios, n=4)
    print(
        f"\nboth ranks at all times: elastic / fixed-2 = {statistics.median(ratios):.3f} "
        f"(quartiles {spread[0]:.3f} and {spread[2]:.3f}, {pairs} pairs)"
    )
    (found,) = [
        each
        for each in httpx.get(f"{url}/v1/cluster", timeout=60, trust_env=False).json()["models"]
        if each["id"] == "elastic"
    ]
    (gang,) = found["gangs"]
    print(f"a change of ranks: {1000 * gang['now']['change_s']:.0f} ms, so far {gang['now']['changes']}")


def _share(found: list[Asked]) -> float:
    return sum(each.in_time for each in found) / len(found) if found else 1.0


def _p95(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.95 * len(seconds))] if seconds else 0.0
