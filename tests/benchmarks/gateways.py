"""Do several gateways cost anything? The same callers on the same gangs, through one gateway and through several.

    python -m tests.benchmarks.gateways [--gateways N] [--gangs N] [--callers N] [--each N] [--rounds N]

Each round serves the demo model of Flux on gangs of one rank, first through one gateway, then through several, and
sends it small pictures. Prints a row for each run: pictures a second, the slowest request, how busy the gangs were, and
by how many that were sent later a request was overtaken at most, beyond those that other gangs ran beside it.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from deploy.spec import Autoscaling, DeploymentSpec, GatewaySpec, Metrics
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


def serve(folder: Path, gateways: int, gangs: int, callers: int, each: int) -> list[Asked]:
    """All requests of the callers, in the order in which they were sent."""
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

        def call(_: int) -> list[Asked]:
            found = []
            for _ in range(each):  # a client of its own each time: Serve's proxy then picks a gateway anew
                with httpx.Client(timeout=600, trust_env=False) as client:
                    sent_s = time.monotonic()
                    answer = client.post(f"{cluster.url}/v1/images/generations", json=WORK)
                    took = answer.json()["metrics"] if answer.status_code == 200 else {}
                    worked_s = sum(
                        sum(s) if isinstance(s, list) else s for n, s in took.items() if n.endswith("seconds")
                    )
                    found.append(Asked(sent_s, time.monotonic(), worked_s, answer.status_code))
            return found

        call(0)  # warms up
        with ThreadPoolExecutor(callers) as threads:
            return sorted((one for some in threads.map(call, range(callers)) for one in some), key=lambda a: a.sent_s)


def overtaken(asked: list[Asked], gangs: int) -> int:
    """By how many requests that were sent later one was overtaken at most."""
    return max(sum(later.answered_s < one.answered_s for later in asked[i + 1 :]) for i, one in enumerate(asked)) - (
        gangs - 1
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="The same load through one gateway and through several.")
    parser.add_argument("--gateways", type=int, default=3)
    parser.add_argument("--gangs", type=int, default=3)
    parser.add_argument("--callers", type=int, default=50)
    parser.add_argument("--each", type=int, default=3, help="requests of each caller, one after another")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    print("| gateways | requests | failed | pictures/s | slowest s | gangs at work | overtaken by | x one gateway |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "flux"
        write_demo_model(folder, "flux")
        for _ in range(arguments.rounds):
            rates: list[float] = []
            for gateways in (1, arguments.gateways):
                asked = serve(folder, gateways, arguments.gangs, arguments.callers, arguments.each)
                wall_s = max(one.answered_s for one in asked) - asked[0].sent_s
                rates.append(len(asked) / wall_s)
                print(
                    f"| {gateways} | {len(asked)} | {sum(one.status != 200 for one in asked)} | {rates[-1]:.2f} | "
                    f"{max(one.answered_s - one.sent_s for one in asked):.1f} | "
                    f"{sum(one.worked_s for one in asked) / wall_s / arguments.gangs:.0%} | "
                    f"{overtaken(asked, arguments.gangs)} | {rates[-1] / rates[0]:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
