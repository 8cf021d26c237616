"""Ten thousand requests that nobody should send, to a live cluster: no 5xx, nobody dies, nobody grows.

`SPRAY_FUZZ_REQUESTS` and `SPRAY_FUZZ_SEED` send other ones; `SPRAY_FUZZ_PLOT=memory.png` draws memory over time. The
quick tests send 200 in tests/live/test_serving.py.
"""

import asyncio
import os
import time
from pathlib import Path

import httpx
import psutil
import pytest
import ray

from deploy.model_sections import Limits
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import deployment, model, rank_actors, ready, wait_for
from tests.support.fuzz import Judged, Memory, fire, memory, serving
from tests.support.fuzz_requests import MODEL, shots
from tests.support.trim import give_back

REQUESTS = int(os.environ.get("SPRAY_FUZZ_REQUESTS", "10000"))
SEED = int(os.environ.get("SPRAY_FUZZ_SEED", "1"))
SETTLED = min(1000, REQUESTS // 4)
"""From here on memory counts: by then everything has been loaded and seen once."""

MOST_GROWN = 0.05
"""Of what a process holds after it has given back what it does not use: glibc keeps free memory between what is used,
and how much of it says more about the order of requests than about what they have left behind."""


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_ten_thousand_wrong_requests_leave_no_mark(demo_model: Path) -> None:
    limits = Limits(max_width=128, max_height=128, max_n=2, size_multiple=8, max_num_inference_steps=4)
    spec = deployment(
        model(demo_model, MODEL, ulysses_degree=2).model_copy(update={"limits": limits, "max_queued": 100})
    )
    judged, seen, settled = Judged(), dict[int, Memory](), list[Memory]()
    with LocalCluster(spec) as cluster:
        ready(cluster)
        description = httpx.get(f"{cluster.url}/openapi.json", trust_env=False, timeout=60).json()
        sent = shots(REQUESTS, SEED, description)
        processes = serving(os.getpid())
        assert {name for name, _ in processes} >= {"gateway", "rank", "proxy"}, processes

        def look(number: int) -> None:
            if number == SETTLED:
                settled.append(trimmed(processes))
            if number % max(1, REQUESTS // 100) == 0:
                seen[number] = memory(processes)  # raises if one has ended
                print(f"{time.strftime('%X')} {number}: {len(judged.faults)} faults", *judged.faults[-1:], flush=True)

        asyncio.run(fire(cluster.url, sent, judged, at_once=6, sent=look))
        wait_for(
            lambda: httpx.get(f"{cluster.url}/readyz", trust_env=False).json()["in_flight"], lambda left: left == 0
        )
        seen[REQUESTS] = memory(processes)
        settled.append(trimmed(processes))
        assert processes.keys() == serving(os.getpid()).keys()
    for (kind, status), count in sorted(judged.statuses.items()):
        print(f"{kind:10} {status or 'closed'} {count}")
    before, after = settled
    grown = after.grown(before)
    for who, share in grown.items():
        held, untrimmed = after.resident[who] >> 20, seen[REQUESTS].resident[who] >> 20
        print(f"{who[0]} {who[1]}: {held} MiB, grown by {share:.1%}; {untrimmed} MiB before it gave back what was free")
    if "SPRAY_FUZZ_PLOT" in os.environ:
        draw(seen, Path(os.environ["SPRAY_FUZZ_PLOT"]))
    assert judged.faults == []
    assert len(judged.pictures) == 1
    assert judged.pictures.total() == len(sent[::50])
    assert {who: share for who, share in grown.items() if share > MOST_GROWN} == {}


def trimmed(processes: dict[tuple[str, int], psutil.Process]) -> Memory:
    """What the processes hold, once each has given back what it does not use."""
    named = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith("SERVE_")]
    actors = [ray.get_actor(a["name"], namespace=a["namespace"]) for a in named] + rank_actors(MODEL)
    ray.get([actor.__ray_call__.remote(give_back) for actor in actors], timeout=120)
    return memory(processes)


def draw(seen: dict[int, Memory], file: Path) -> None:
    """Resident memory of each process by the number of requests."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for who in seen[REQUESTS].resident:
        axes.plot(
            sorted(seen), [seen[number].resident[who] / 2**20 for number in sorted(seen)], label=f"{who[0]} {who[1]}"
        )
    axes.set(xlabel="requests", ylabel="resident, MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120)
