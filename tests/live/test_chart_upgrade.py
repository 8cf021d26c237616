"""A new image makes a second cluster beside the first, which takes over: what the first computes then is finished.

Both start as KubeRay would start them. The test moves the service when KubeRay would, and ends the first cluster.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helm.chart import Values, profile, ray_service, render, with_values
from tests.support.chart_nodes import PATIENCE_S, WORKER, Nodes, empty_cluster, wait
from tests.support.kube_service import Service
from tests.support.programs import needs_iproute

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500), needs_iproute]

LONG, SHORT = 2000, 2
"""Steps of the request that the switch must not end, and of those that come all the time."""

SEEDS = 3


@pytest.fixture
def values(demo_model: Path, tmp_path: Path) -> Values:
    """The trial with one rank, so that two clusters fit on two cores."""
    trial = profile("trial")
    trial["models"][0] |= {"source": str(demo_model), "parallel": {"ulysses_degree": 1}}
    trial["models"][0]["limits"] |= {"max_num_inference_steps": LONG}
    return with_values(trial, {"storage": {"models": str(tmp_path / "hub")}})


@contextmanager
def cluster(values: Values) -> Iterator[Nodes]:
    """Started as KubeRay would, until it would send callers there."""
    with empty_cluster(values) as started:
        started.start("head")
        wait(lambda: started.probe("head", "readiness"))
        started.start("worker")
        started.apply(values)
        wait(started.all_run)
        yield started


def asked(seed: int, steps: int, **more: Any) -> dict[str, Any]:
    body = {"model": "demo", "prompt": "a cup of coffee", "size": "64x64", "seed": seed, "num_inference_steps": steps}
    return {"json": body | more, "timeout": PATIENCE_S, "trust_env": False}


def drawn(url: str, seed: int, steps: int) -> str:
    answer = httpx.post(f"{url}/v1/images/generations", **asked(seed, steps, response_format="b64_json"))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"][0]["b64_json"])


def streamed(url: str, seed: int, steps: int, begun: threading.Event) -> str:
    """The picture at the end of a stream, which sets the event when its first step is told."""
    body = asked(seed, steps, stream=True, stream_options={"include_progress": True})
    with httpx.stream("POST", f"{url}/v1/images/generations", **body) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ") and not begun.set()]
    assert lines[-1] == "[DONE]", lines[-1]
    return str(json.loads(lines[-2])["b64_json"])


class Callers:
    """Draw all the time, over one address, until `end`.

    Attributes:
        pictures: what each seed has given, and how often.
    """

    def __init__(self, url: str) -> None:
        self.pictures: Counter[tuple[int, str]] = Counter()
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(SEEDS)
        self._all: list[Future[None]] = [self._pool.submit(self._draw, url, seed) for seed in range(SEEDS)]

    def _draw(self, url: str, seed: int) -> None:
        while not self._over.is_set():
            self.pictures[seed, drawn(url, seed, SHORT)] += 1

    def end(self) -> None:
        """Raises what any of them has met."""
        self._over.set()
        for each in self._all:
            each.result()


def test_the_old_cluster_finishes_what_it_computes_when_the_new_one_serves(values: Values) -> None:
    changed = with_values(values, {"image": {"tag": "0.2.0"}})
    before, after = (ray_service(render(each))["spec"] for each in (values, changed))
    assert before["rayClusterConfig"] != after["rayClusterConfig"], "KubeRay would start no second cluster"
    assert after["upgradeStrategy"] == {"type": "NewCluster"}

    service = Service()
    with cluster(values) as old:
        service.point("old", old.enter["worker"], (WORKER, 8000))
        callers = Callers(service.url)
        with ThreadPoolExecutor(1) as pool, cluster(changed) as new:
            begun = threading.Event()
            long = pool.submit(streamed, service.url, 7, LONG, begun)
            assert begun.wait(PATIENCE_S)

            assert new.probe("worker", "readiness"), "no endpoint is ready where KubeRay sends callers"
            service.point("new", new.enter["worker"], (WORKER, 8000))
            reached = service.connections["new"]
            first = drawn(service.url, 8, SHORT)
            assert service.connections["new"] > reached
            assert not long.done(), "the request was over before the switch"

            picture = long.result()
            wait(lambda: not service.open["old"])
            for name in ("head", "worker"):
                old.kill(name)
            assert drawn(service.url, 8, SHORT) == first
            wait(lambda: service.connections["new"] > reached + 2 * SEEDS)
            callers.end()
            assert drawn(service.url, 7, LONG) == picture
    assert {seed for seed, _ in callers.pictures} == set(range(SEEDS))
    assert len(callers.pictures) == SEEDS, "both clusters draw the same"
    service.close()
