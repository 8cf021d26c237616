"""Do several gateways cost anything? The same callers on the same gangs, through one gateway and through several.

    python -m tests.benchmarks.gateways [--gateways N] [--gangs N] [--callers N] [--each N] [--rounds N]

Each round serves the demo model of Flux on gangs of one rank, first through one gateway, then through several, and
sends it small pictures. Prints a row for each run: pictures a second, the slowest request, how busy the gangs were, for
how long at most one of them idled while work waited, and by how many that were sent later a request was overtaken at
most, beyond those that other gangs ran beside it.

Then the processor time of a picture, by process: `gateways` with the keeper of their queue, `Serve` its controller and
proxy, `rest` Ray's own. Where all processors are busy, more of it is fewer pictures a second, whoever waits for whom.
"""

import argparse
import ssl
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from deploy.gateway_spec import GatewaySpec
from deploy.model_sections import Autoscaling
from deploy.spec import DeploymentSpec, Metrics
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import model, ready
from workers.demo_models.writer import write_demo_model

WORK = {"model": "demo", "prompt": "a cup of coffee", "size": "64x64", "num_inference_steps": 4, "guidance_scale": 0}


@dataclass(frozen=True)
class Asked:
    """A request: when it was sent and answered, in seconds; how long the ranks worked; the HTTP status."""

    sent_s: float
    answered_s: float
    worked_s: float
    status: int


KINDS = {"ray::RankActor": "ranks", "ray::ServeReplica:gateway": "gateways", "ray::Keeper": "gateways"} | {
    "ray::ServeReplica:": "gangs", "ray::ServeController": "Serve", "ray::ProxyActor": "Serve"
}  # fmt: skip
"""Of processes, by how Ray's titles begin. The rest is Ray's own."""


def processor() -> Counter[str]:
    """Seconds of processor time of the cluster's processes so far, by kind."""
    found: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        try:
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:  # it has ended
            continue
        kind = next((kind for begin, kind in KINDS.items() if title.startswith(begin)), "rest")
        found[kind] += times.user + times.system
    return found


def serve(folder: Path, gateways: int, gangs: int, callers: int, each: int) -> tuple[list[Asked], dict[str, float]]:
    """All requests of the callers, in the order in which they were sent; processor seconds meanwhile, by kind."""
    served = model(folder).model_copy(
        update={
            "autoscaling": Autoscaling(min_replicas=gangs, max_replicas=gangs),
            "max_queued": callers * each,
        }
    )
    spec = DeploymentSpec(models=(served,), gateway=GatewaySpec(port=0, replicas=gateways), metrics=Metrics(port=0))
    with LocalCluster(spec) as cluster:
        ready(cluster)
        time.sleep(3)  # all gateways have heard of all gangs
        tls = ssl.create_default_context()  # unused, and each client would take 20 ms to make its own

        def call(_: int) -> list[Asked]:
            found = []
            for _ in range(each):  # a client of its own each time: Serve's proxy then picks a gateway anew
                with httpx.Client(timeout=600, trust_env=False, verify=tls) as client:
                    sent_s = time.monotonic()
                    answer = client.post(f"{cluster.url}/v1/images/generations", json=WORK)
                    took = answer.json()["metrics"] if answer.status_code == 200 else {}
                    worked_s = sum(
                        sum(s) if isinstance(s, list) else s for n, s in took.items() if n.endswith("seconds")
                    )
                    found.append(Asked(sent_s, time.monotonic(), worked_s, answer.status_code))
            return found

        call(0)  # warms up
        before = processor()
        with ThreadPoolExecutor(callers) as threads:
            asked = [one for some in threads.map(call, range(callers)) for one in some]
        return sorted(asked, key=lambda one: one.sent_s), dict(processor() - before)


def overtaken(asked: list[Asked], gangs: int) -> int:
    """By how many requests that were sent later one was overtaken at most."""
    return max(sum(later.answered_s < one.answered_s for later in asked[i + 1 :]) for i, one in enumerate(asked)) - (
        gangs - 1
    )


def idle_s(asked: Sequence[Asked], gangs: int) -> float:
    """The longest time in which fewer than all gangs worked while work waited; too long by what an answer takes."""

    def changes() -> Iterator[tuple[float, int, int]]:
        for one in asked:
            yield one.sent_s, 0, 1
            yield one.answered_s - one.worked_s, 1, -1
            yield one.answered_s, -1, 0

    at_work = waiting = 0
    longest, since = 0.0, None
    for at_s, working, came in sorted(changes()):
        if since is not None:
            longest = max(longest, at_s - since)
        at_work, waiting = at_work + working, waiting + came
        if at_work >= gangs or not waiting:
            since = None
        elif since is None:
            since = at_s
    return longest


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="The same load through one gateway and through several.")
    parser.add_argument("--gateways", type=int, default=3)
    parser.add_argument("--gangs", type=int, default=3)
    parser.add_argument("--callers", type=int, default=50)
    parser.add_argument("--each", type=int, default=3, help="requests of each caller, one after another")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    kinds = list(dict.fromkeys([*KINDS.values(), "rest"]))
    columns = "requests failed pictures/s slowest_s gangs_at_work idle_at_most_s overtaken_by x_one_gateway".split()
    heads = ["gateways", *columns, *(f"{kind}, ms" for kind in kinds), "all, ms"]
    print(f"| {' | '.join(heads)} |".replace("_", " "))
    print("|" + "---|" * len(heads))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "flux"
        write_demo_model(folder, "flux")
        for _ in range(arguments.rounds):
            rates: list[float] = []
            for gateways in (1, arguments.gateways):
                asked, spent = serve(folder, gateways, arguments.gangs, arguments.callers, arguments.each)
                wall_s = max(one.answered_s for one in asked) - asked[0].sent_s
                rates.append(len(asked) / wall_s)
                each_ms = [1e3 * spent.get(kind, 0.0) / len(asked) for kind in kinds]
                print(
                    f"| {gateways} | {len(asked)} | {sum(one.status != 200 for one in asked)} | {rates[-1]:.2f} | "
                    f"{max(one.answered_s - one.sent_s for one in asked):.1f} | "
                    f"{sum(one.worked_s for one in asked) / wall_s / arguments.gangs:.0%} | "
                    f"{idle_s(asked, arguments.gangs):.2f} | {overtaken(asked, arguments.gangs)} | "
                    f"{rates[-1] / rates[0]:.2f} | {' | '.join(f'{ms:.0f}' for ms in [*each_ms, sum(each_ms)])} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
