"""What measuring costs a step: calls in a step x the cost of one, for layouts that call often.

    python -m tests.benchmarks.observing [--calls N]

Calls are counted in guided steps of a tiny Qwen-Image with two and with four blocks, and continued to the 60 blocks of
the real one. The cost of a call is the median of many, on this machine. Where there is a GPU, its events are measured,
of which one step of `CUDA_STEPS_PER_TIMED` has some; else the clock of a CPU, which each step reads. What a step
observes itself goes into files that the node shares, as in a gang. The bar is 0.25 ms a step.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from unittest import mock

import torch

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.traffic import CUDA_STEPS_PER_TIMED, OPS, Traffic
from sp_core.verify.rank_pool import RankPool
from tests.support import qwen
from tests.support.guided import guided_step
from workers.exporter import share_values
from workers.observing import RankMetrics

BAR_MS = 0.25
BLOCKS = 60
LAYOUTS = (
    ParallelDegrees(ulysses_degree=2),
    ParallelDegrees(ulysses_degree=2, cfg_parallel_size=2),
    ParallelDegrees(ulysses_degree=2, ring_degree=2),
    ParallelDegrees(ulysses_degree=2, tensor_parallel_size=2),
)


def calls_in_a_step(mesh: ParallelMesh, blocks: int) -> int:
    """Calls of collectives in the second guided step of a rank; the first one agrees on lengths."""
    model = qwen.transformer(layers=blocks)
    parallelize(model, mesh)
    given = qwen.inputs(height=4, width=4, text=4)
    guided_step(model, (given, given), mesh.axis("cfg"))
    with mesh.traffic.step(), mock.patch.object(mesh.traffic, "begin", side_effect=mesh.traffic.begin) as begin:
        guided_step(model, (given, given), mesh.axis("cfg"))
    return int(begin.call_count)


def cost_of_a_call(calls: int) -> float:
    """Microseconds, averaged over timed and untimed steps."""
    on_cuda = torch.cuda.is_available()
    traffic, sent = Traffic(on_cuda), torch.ones(8)
    steps = CUDA_STEPS_PER_TIMED if on_cuda else 1

    def once() -> None:
        for _ in range(steps):
            with traffic.step() as spent:
                for _ in range(calls):
                    begun = traffic.begin()
                    traffic.end("all_reduce", 2 * 3 * sent.nbytes / 4, begun)
            if on_cuda:
                torch.cuda.synchronize()
            if spent is not None:
                spent.seconds()

    return _median_us(once, 50) / (steps * calls)


def cost_of_a_step() -> float:
    """Microseconds of what a rank observes once a step, in files that are shared."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RAY_RAYLET_PID": "1", "SPRAY_METRICS_DIR": folder}
        assert share_values() is not None
        metrics = RankMetrics("m", "0", 0, "ulysses_degree=2")
        moved = dict.fromkeys(OPS, 0.001)

        def once() -> None:
            metrics.step(0.1, "1024x1024")
            metrics.in_collectives(moved, 0.001)
            metrics.sent(moved)

        return _median_us(once, 1000)


def _median_us(work: Callable[[], None], times: int) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return 1e6 * statistics.median(taken)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="What measuring costs a step.")
    parser.add_argument("--calls", type=int, default=240, help="calls in a step whose cost is measured")
    calls = parser.parse_args().calls
    call_us, step_us = cost_of_a_call(calls), cost_of_a_step()
    print(
        f"{'GPU' if torch.cuda.is_available() else 'CPU'}: {call_us:.2f} us a call, {step_us:.0f} us a step besides\n"
    )
    print("| layout | calls a step, 60 blocks | ms a step | within 0.25 ms |\n|---|---|---|---|")
    pool = RankPool(max(layout.world_size for layout in LAYOUTS))
    try:
        for layout in LAYOUTS:
            few, more = (max(pool.run(layout, calls_in_a_step, blocks)) for blocks in (2, 4))
            whole = few + (more - few) * (BLOCKS - 2) // 2
            cost_ms = (whole * call_us + step_us) / 1e3
            print(f"| `{layout}` | {whole} | {cost_ms:.3f} | {'yes' if cost_ms <= BAR_MS else 'no'} |")
    finally:
        pool.stop()


if __name__ == "__main__":
    main()
