"""What the service costs: a request through REST against the same pipeline called directly in a process.

    python -m tests.benchmarks.overhead [--repeats N]

One run, interleaved repeats, one table of medians. The gang has one rank, so that both sides compute the same; the
direct side runs in a process of its own with the same number of threads.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import httpx

from service.rollout.local_cluster import LocalCluster
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from tests.support.deployments import deployment, model
from workers.messages import GenerationRequest
from workers.model.denoising import Denoising
from workers.model.loader import load_model
from workers.model.media import encode

STEPS = (4, 30)
SIZE = 128


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Overhead of a request through REST.")
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "demo"
        subprocess.run(
            [sys.executable, "-m", "workers.demo_models", str(source), "--family", "qwen-image"],
            check=True,
            capture_output=True,
        )
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        direct = multiprocessing.get_context("spawn").Process(target=serve_directly, args=(source, theirs), daemon=True)
        direct.start()
        with LocalCluster(deployment(model(source))) as cluster:
            cluster.wait_ready(timeout_s=120)
            rows = [measure(cluster.url, ours, steps, repeats) for steps in STEPS]
        direct.kill()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; medians of {repeats}, ms per request")
    print(f"{'steps':>5} {'direct':>8} {'REST':>8} {'overhead':>9} {'p90 REST':>9}")
    for steps, inside, through in rows:
        p90 = statistics.quantiles(through, n=10)[-1]
        medians = statistics.median(inside), statistics.median(through)
        print(f"{steps:>5} {medians[0]:>8.1f} {medians[1]:>8.1f} {medians[1] - medians[0]:>9.1f} {p90:>9.1f}")


def measure(url: str, direct: Connection, steps: int, repeats: int) -> tuple[int, list[float], list[float]]:
    """Milliseconds of each request, inside a process and through REST, turn by turn."""
    inside, through = [], []
    body = {"prompt": "a cup of coffee", "seed": 1, "size": f"{SIZE}x{SIZE}", "num_inference_steps": steps}
    with httpx.Client(trust_env=False, timeout=60) as client:
        for repeat in range(repeats + 2):
            direct.send(steps)
            seconds = direct.recv()
            began = time.perf_counter()
            client.post(f"{url}/v1/images/generations", json=body).raise_for_status()
            if repeat >= 2:  # the first two warm both sides up
                inside.append(seconds * 1e3)
                through.append((time.perf_counter() - began) * 1e3)
    return steps, inside, through


def serve_directly(source: Path, requests: Connection) -> None:
    """The same work without a service: answer each number of steps with the seconds that a request takes."""
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    loaded = load_model(model(source), mesh)
    while True:
        request = GenerationRequest("b", "demo", "a cup of coffee", SIZE, SIZE, requests.recv(), seed=1)
        began = time.perf_counter()
        denoising = Denoising(loaded, request)
        denoising.encode()
        denoising.prepare()
        while not denoising.done:
            denoising.step()
        encode(denoising.finish()[0], denoising.request)
        requests.send(time.perf_counter() - began)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
