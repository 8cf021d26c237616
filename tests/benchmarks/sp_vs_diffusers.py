"""Sequence parallelism on two CPU ranks: ours against diffusers' own, and against one process.

    python -m tests.benchmarks.sp_vs_diffusers [--repeats N] [--tokens 900 2000]

A Qwen-Image-shaped transformer of about 100 million parameters with random weights; two gloo ranks with one thread
each. All modes take turns in one run on the same processes; the table shows the median seconds of a forward on the
slower rank, and each mode's time relative to ours.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig, QwenImageTransformer2DModel
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.rank_pool import RankPool

TEXT = 64
MODES = ("ours, ulysses 2", "ours, ring 2", "diffusers, ulysses 2", "diffusers, anything 2", "1 thread", "2 threads")


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Forward time of one transformer, ours against diffusers' own.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[900, 2000])
    arguments = parser.parse_args()
    pool = RankPool(size=2)
    print(f"median seconds of a forward, {arguments.repeats} turns, {os.cpu_count()} cores, {TEXT} text tokens")
    for tokens in arguments.tokens:
        ranks = pool.run(ParallelDegrees(ulysses_degree=2), compare, tokens, arguments.repeats)
        slower = {mode: [max(pair) for pair in zip(*(rank[mode] for rank in ranks), strict=True)] for mode in MODES}
        ours = statistics.median(slower[MODES[0]])
        print(f"\n{tokens} image tokens")
        for mode in MODES:
            median = statistics.median(slower[mode])
            print(f"  {mode:<22} {median:>7.3f} s {median / ours:>6.2f} x ours (min {min(slower[mode]):.3f})")
    pool.stop()


def compare(ulysses: ParallelMesh, tokens: int, repeats: int) -> dict[str, list[float]]:
    """On one rank: seconds of each mode's forwards, turn by turn."""
    ring = ParallelMesh.create(ParallelDegrees(ring_degree=2), device_type="cpu", timeout_s=60)
    models = {"ours": transformer(), "diffusers": transformer(), "anything": transformer(), "plain": transformer()}
    context_parallel(models["diffusers"], ulysses_degree=2)
    context_parallel(models["anything"], ulysses_degree=2, ulysses_anything=True)
    side = int(tokens**0.5)
    inputs = {
        "hidden_states": torch.randn(1, side * (tokens // side), 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 256),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, side, tokens // side)]],
    }
    for tensor in inputs.values():  # the same on both ranks
        if isinstance(tensor, torch.Tensor):
            dist.broadcast(tensor, 0)

    def parallel(model: str, mesh: ParallelMesh | None = None) -> float:
        handle = parallelize(models[model], mesh) if mesh else None
        seconds = timed(lambda: models[model](**inputs))
        if handle:
            handle.remove()
        return seconds

    def alone(threads: int) -> float:
        torch.set_num_threads(threads)
        seconds = timed(lambda: models["plain"](**inputs)) if dist.get_rank() == 0 else 0.0
        torch.set_num_threads(1)
        return seconds

    runs: dict[str, Callable[[], float]] = {
        MODES[0]: lambda: parallel("ours", ulysses),
        MODES[1]: lambda: parallel("ours", ring),
        MODES[2]: lambda: parallel("diffusers"),
        MODES[3]: lambda: parallel("anything"),
        MODES[4]: lambda: alone(1),
        MODES[5]: lambda: alone(2),
    }
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    order = list(runs)
    shuffled = random.Random(0)  # the same on both ranks; who comes after whom must not matter
    with torch.no_grad():
        for turn in range(repeats + 1):
            shuffled.shuffle(order)
            for mode in order:
                dist.barrier()
                took = runs[mode]()
                if turn:  # the first warms up
                    seconds[mode].append(took)
    return seconds


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def transformer() -> QwenImageTransformer2DModel:
    """Qwen-Image's shape, 12 heads of 64, about 100 million parameters."""
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=5, attention_head_dim=64, num_attention_heads=12,
        joint_attention_dim=256, axes_dims_rope=(8, 28, 28),
    ).eval()  # fmt: skip


def context_parallel(model: QwenImageTransformer2DModel, **options: Any) -> None:
    """diffusers' context parallelism on CPU, which its own entry point refuses."""
    config = ContextParallelConfig(**options)
    mesh = dist.device_mesh.init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
    for module in model.modules():
        if isinstance(module, Attention | AttentionModuleMixin):
            module.processor._parallel_config = parallel
    apply_context_parallel(model, config, model._cp_plan)


if __name__ == "__main__":
    main()
