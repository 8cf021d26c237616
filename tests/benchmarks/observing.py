"""What measuring costs a step: calls in a step x the cost of one, for layouts that call often.

    python -m tests.benchmarks.observing [--calls N] [--rounds N]

Calls are counted in guided steps of a tiny Qwen-Image with two and with four blocks, and continued to the 60 blocks of
the real one. The cost of a call is what a function of `sp_core.collectives` takes more than the same without counting,
while the exchange itself does nothing: in pairs, in CPU time of this thread, so that other programs hardly matter. It
is averaged over `STEPS_PER_TIMED` steps, of which one is timed: by the clock, or by events where there is a GPU. What a
step observes itself goes into files that the node shares, as in a gang. The bar is 0.25 ms a step.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from sp_core import collectives
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import MeshAxis, ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.traffic import STEPS_PER_TIMED, InCollectives, Op, Sent, Traffic
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
SENT = [2, 2]
"""Elements of the messages of an exchange."""

Costs = list[float]
"""Microseconds, of each round."""


def calls_in_a_step(mesh: ParallelMesh, blocks: int) -> Counter[Op]:
    """Calls of collectives in the second guided step of a rank; the first one agrees on lengths."""
    model = qwen.transformer(layers=blocks)
    parallelize(model, mesh)
    given = qwen.inputs(height=4, width=4, text=4)
    guided_step(model, (given, given), mesh.axis("cfg"))
    found: Counter[Op] = Counter()
    with (
        mock.patch.object(InCollectives, "begin", lambda _, op: found.update([op])),
        mesh.traffic.step(timed=True),
    ):
        guided_step(model, (given, given), mesh.axis("cfg"))
    return found


def bare_all_to_all(packed: torch.Tensor, send_sizes: list[int], receive_sizes: list[int], axis: MeshAxis) -> Any:
    """`collectives.all_to_all`, not counted."""
    received = packed.new_empty(sum(receive_sizes))
    dist.all_to_all_single(received, packed, receive_sizes, send_sizes, group=axis.group)
    return received


def bare_all_reduce(tensor: torch.Tensor, axis: MeshAxis) -> torch.Tensor:
    """`collectives.all_reduce`, not counted."""
    if axis.size == 1:
        return tensor
    if torch.compiler.is_compiling():
        return tensor
    dist.all_reduce(tensor, group=axis.group)
    return tensor


def cost_of_a_call(calls: int, rounds: int) -> dict[str, Costs]:
    """By kind, averaged over timed and untimed steps."""
    on_cuda = torch.cuda.is_available()
    traffic, tensor = Traffic(on_cuda), torch.ones(sum(SENT), device="cuda" if on_cuda else "cpu")
    received = tensor.clone()
    tensor.new_empty = lambda _: received  # type: ignore[method-assign, assignment]  # else memory would decide
    axis = MeshAxis("ulysses", 0, 2, None, None, traffic)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "all_to_all": (
            lambda: collectives.all_to_all(tensor, SENT, SENT, axis),
            lambda: bare_all_to_all(tensor, SENT, SENT, axis),
        ),
        "all_reduce": (lambda: collectives.all_reduce(tensor, axis), lambda: bare_all_reduce(tensor, axis)),
    }

    def counted(call: Callable[[], Any]) -> None:
        for step in range(STEPS_PER_TIMED):
            with traffic.step(step == 0) as spent:
                for _ in range(calls):
                    call()
            if spent is not None:
                if on_cuda:
                    torch.cuda.synchronize()
                spent.seconds()

    def bare(call: Callable[[], Any]) -> None:
        for _ in range(STEPS_PER_TIMED * calls):
            call()

    nothing: dict[str, Any] = {"all_to_all_single": lambda *_, group: None, "all_reduce": lambda _, group: None}
    with mock.patch.multiple(dist, **nothing):
        return {
            kind: [(_cpu_us(counted, ours) - _cpu_us(bare, theirs)) / (STEPS_PER_TIMED * calls) for _ in range(rounds)]
            for kind, (ours, theirs) in pairs.items()
        }


def cost_of_a_step(rounds: int) -> Costs:
    """Of what a rank observes once a step, in files that are shared; averaged over timed and untimed steps."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RAY_RAYLET_PID": "1", "SPRAY_METRICS_DIR": folder}
        assert share_values() is not None
        metrics, traffic = RankMetrics("m", "0", 0, "ulysses_degree=2"), Traffic()
        kinds: tuple[Op, ...] = ("all_to_all", "ring", "all_reduce", "gather")

        def once() -> None:
            for step in range(STEPS_PER_TIMED):
                metrics.step(0.1, "1024x1024")
                traffic.sent = Sent(1, 1, 1, 0, 1)
                metrics.in_collectives(None if step else dict.fromkeys(kinds, 0.001), 0.001)
                metrics.traffic(traffic)

        once()
        return [_cpu_us(once) / STEPS_PER_TIMED for _ in range(rounds)]


def _cpu_us(work: Callable[..., None], *arguments: Any) -> float:
    began = time.thread_time_ns()
    work(*arguments)
    return (time.thread_time_ns() - began) / 1e3


def _tenths(costs: Costs) -> tuple[float, float, float]:
    """The median, and the first and the last tenth."""
    first, *_, last = statistics.quantiles(costs, n=10)
    return statistics.median(costs), first, last


def cost_ms(calls: Mapping[Op, int], call_us: Mapping[str, Costs], step_us: Costs) -> Costs:
    """Of a step, in each round. Kinds that are not measured themselves count as exchanges, which cost more."""
    rounds = zip(*call_us.values(), step_us, strict=True)
    kinds = [*call_us]
    return [
        (sum(n * each[kinds.index(op if op in call_us else "all_to_all")] for op, n in calls.items()) + each[-1]) / 1e3
        for each in rounds
    ]


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="What measuring costs a step.")
    parser.add_argument("--calls", type=int, default=240, help="calls in a step whose cost is measured")
    parser.add_argument("--rounds", type=int, default=50, help="how often")
    options = parser.parse_args()
    call_us, step_us = cost_of_a_call(options.calls, options.rounds), cost_of_a_step(options.rounds)
    print("GPU" if torch.cuda.is_available() else "CPU", "us, median (first and last tenth):")
    for name, costs in {**call_us, "a step besides": step_us}.items():
        print("  {}: {:.3f} ({:.3f}, {:.3f})".format(name, *_tenths(costs)))
    print("\n| layout | calls a step, 60 blocks | ms a step | first and last tenth | within 0.25 ms |")
    print("|---|---|---|---|---|")
    pool = RankPool(max(layout.world_size for layout in LAYOUTS))
    try:
        for layout in LAYOUTS:
            few, more = (max(pool.run(layout, calls_in_a_step, blocks), key=Counter.total) for blocks in (2, 4))
            whole = {op: few[op] + (more[op] - few[op]) * (BLOCKS - 2) // 2 for op in more}
            median, first, last = _tenths(cost_ms(whole, call_us, step_us))
            within = "yes" if last <= BAR_MS else "no"
            print(f"| `{layout}` | {sum(whole.values())} | {median:.3f} | {first:.3f}, {last:.3f} | {within} |")
    finally:
        pool.stop()


if __name__ == "__main__":
    main()
