"""Load on one of two models: its gangs come and go, those of the other stay, and no request fails.

    python -m tests.benchmarks.autoscale [--seconds N] [--output FOLDER]

A local cluster serves two demo models. Callers ask one of them for so long; then it is left alone until its last gang
has gone, and asked once more. Prints a table; writes a plot (PNG) of gangs and backlog over time.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import matplotlib.pyplot as plt

from deploy.model_sections import Autoscaling, Defaults
from deploy.model_spec import ModelSpec
from service.cli.client import read_cluster
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import deployment, model, ready
from workers.demo_models.writer import write_demo_model

PERIOD_S = 0.5

PATIENCE_S = 240.0
"""For the gangs to come, and for them to go."""

SCALING = Autoscaling(
    min_replicas=0,
    max_replicas=3,
    target_backlog_seconds=2,
    upscale_delay_s=1,
    downscale_delay_s=6,
    downscale_to_zero_delay_s=12,
)

WORK = {"prompt": "a cup of coffee", "size": "128x128", "num_inference_steps": 20, "guidance_scale": 0}


@dataclass(frozen=True)
class Sample:
    """The cluster at one moment: seconds since the start; gangs by model; the loaded model's waiting and seconds."""

    at_s: float
    gangs: dict[str, int]
    queued: int
    backlog_s: float


@dataclass
class Run:
    """What was seen.

    Attributes:
        samples: the cluster over time.
        answers: HTTP status of every request.
        waits: seconds of every request.
        loaded_s: when the load ended.
        pids: of the ranks of the model without load, at the start and at the end.
    """

    samples: list[Sample] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    loaded_s: float = 0.0
    pids: list[Sequence[int]] = field(default_factory=list)

    def gangs(self, name: str) -> list[int]:
        """Numbers of gangs of a model over time, without repetitions."""
        counts = [sample.gangs[name] for sample in self.samples]
        return [count for i, count in enumerate(counts) if i == 0 or counts[i - 1] != count]


def models(folder: Path, scaling: Autoscaling = SCALING) -> tuple[ModelSpec, ModelSpec]:
    """One that scales from nothing, one that does not scale."""
    busy = model(folder, "busy").model_copy(
        update={"autoscaling": scaling, "max_queued": 64, "defaults": Defaults(width=64, height=48)}
    )
    return busy, model(folder, "still")


def measure(server: str, seconds: float, most: int = SCALING.max_replicas, callers: int = 6) -> Run:
    """Load the model `busy`, then wait until it sleeps, then wake it.

    Args:
        server: its base URL.
        seconds: of load at least; it goes on until all the gangs that may run have come, or patience ends.
        most: gangs that may run.
        callers: that ask at once, each again when it is answered.
    """
    run, began, over = Run(), time.monotonic(), threading.Event()
    client = httpx.Client(timeout=300, trust_env=False, limits=httpx.Limits(max_connections=callers + 1))

    def ask() -> None:
        asked = time.monotonic()
        answer = client.post(f"{server}/v1/images/generations", json=WORK | {"model": "busy"})
        run.answers.append(answer.status_code)
        run.waits.append(time.monotonic() - asked)

    def watch() -> None:
        while not over.is_set():
            found = {each["id"]: each for each in read_cluster(server)["models"]}
            gangs = {name: each["replicas"].get("RUNNING", 0) for name, each in found.items()}
            backlog_s = sum(gang["backlog_s"] for gang in found["busy"]["gangs"])
            run.samples.append(Sample(time.monotonic() - began, gangs, found["busy"]["queued"], backlog_s))
            over.wait(PERIOD_S)

    def pids() -> Sequence[int]:
        while True:  # a gang reports every second
            (still,) = (each for each in read_cluster(server)["models"] if each["id"] == "still")
            if still["gangs"]:
                return [pid for gang in still["gangs"] for pid in gang["now"]["pids"]]
            time.sleep(PERIOD_S)

    def all_came() -> bool:
        return any(sample.gangs["busy"] == most for sample in run.samples)

    def load() -> None:
        while (passed := time.monotonic() - began) < seconds or (passed < PATIENCE_S and not all_came()):
            ask()

    def wait_for(gangs: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while run.samples[-1].gangs["busy"] != gangs and time.monotonic() < deadline:
            time.sleep(PERIOD_S)

    run.pids.append(pids())
    with ThreadPoolExecutor(callers + 1) as threads:
        watching = threads.submit(watch)
        try:
            for caller in [threads.submit(load) for _ in range(callers)]:
                caller.result()
            run.loaded_s = time.monotonic() - began
            wait_for(0)
            ask()  # wakes it
            wait_for(1)  # the cluster's view lags behind the answer
        finally:
            over.set()
        watching.result()
    run.pids.append(pids())
    return run


def plot(run: Run, file: Path) -> None:
    """Gangs over time above, what waits and runs below."""
    at = [sample.at_s for sample in run.samples]
    figure, (gangs, backlog) = plt.subplots(2, sharex=True, figsize=(9, 5), layout="constrained")
    for name in run.samples[0].gangs:
        gangs.step(at, [sample.gangs[name] for sample in run.samples], where="post", label=name)
    gangs.set_ylabel("gangs")
    gangs.legend()
    backlog.plot(at, [sample.queued for sample in run.samples], label="requests waiting")
    backlog.plot(at, [sample.backlog_s for sample in run.samples], label="seconds running")
    backlog.set_ylabel("load of busy")
    backlog.set_xlabel("seconds")
    backlog.legend()
    for axes in (gangs, backlog):
        axes.axvline(run.loaded_s, color="grey", linestyle=":")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Load on one of two models.")
    parser.add_argument("--seconds", type=float, default=90, help="of load")
    parser.add_argument("--output", type=Path, default=Path("tests/benchmarks/results"), help="folder of the plot")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "demo"
        write_demo_model(folder, "z-image")
        with LocalCluster(deployment(*models(folder))) as cluster:
            ready(cluster)
            run = measure(cluster.url, arguments.seconds)
    file = arguments.output / f"{time.strftime('%Y-%m-%d')}-autoscale.png"
    plot(run, file)
    waits = sorted(run.waits)
    print("| requests | failed | median s | p95 s | slowest s | gangs of busy | gangs of still | its ranks kept |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {len(waits)} | {sum(answer != 200 for answer in run.answers)} | {waits[len(waits) // 2]:.1f} | "
        f"{waits[int(0.95 * len(waits))]:.1f} | {waits[-1]:.1f} | {' '.join(map(str, run.gangs('busy')))} | "
        f"{' '.join(map(str, run.gangs('still')))} | {'yes' if run.pids[0] == run.pids[1] else 'no'} |"
    )
    print(f"\nplot: {file}")


if __name__ == "__main__":
    main()
