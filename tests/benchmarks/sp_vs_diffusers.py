"""Sequence parallelism on two CPU ranks: ours against diffusers' own, and against one process.

    python -m tests.benchmarks.sp_vs_diffusers [--repeats N] [--tokens 900 2000] [--models qwen-image wan z-image]

Transformers of about 100 million parameters with random weights, in the shape of three families; two gloo ranks with
one thread each. All modes take turns in one run on the same processes, in shuffled order; the table shows the median
seconds of a forward on the slower rank, and each mode's time relative to ours: the median of the ratios of one turn.
diffusers has no plan for Z-Image; it is given ours. At last: what hooks and seam cost where nothing is exchanged.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist
from diffusers import (
    ContextParallelConfig,
    ParallelConfig,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from sp_core.attention.diffusers_backend import bind_attention
from sp_core.attention.discovery import find_attention
from sp_core.degrees import ParallelDegrees
from sp_core.hooks import apply_sequence_parallel
from sp_core.mesh import ParallelMesh
from sp_core.models.qwen_image import QWEN_IMAGE
from sp_core.parallelize import parallelize
from sp_core.verify.rank_pool import RankPool

TEXT = 64
MODES = ("ours, ulysses 2", "ours, ring 2", "diffusers, ulysses 2", "diffusers, anything 2", "1 thread", "2 threads")


def qwen_image() -> Any:
    """12 heads of 64."""
    return QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=5, attention_head_dim=64, num_attention_heads=12,
        joint_attention_dim=256, axes_dims_rope=(8, 28, 28),
    )  # fmt: skip


def qwen_image_inputs(height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, height * width, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 256),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, height, width)]],
    }


def wan() -> Any:
    """8 heads of 128."""
    return WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=128, text_dim=256, ffn_dim=4096, num_layers=6, cross_attn_norm=True
    )


def wan_inputs(height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 1, 2 * height, 2 * width),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, TEXT, 256),
    }


def z_image() -> Any:
    """8 heads of 128."""
    return ZImageTransformer2DModel(dim=1024, n_heads=8, n_kv_heads=8, n_layers=5, n_refiner_layers=2, cap_feat_dim=256)


def z_image_inputs(height: int, width: int) -> dict[str, Any]:
    return {
        "x": [torch.randn(16, 1, 2 * height, 2 * width)],
        "t": torch.tensor([0.5]),
        "cap_feats": [torch.randn(TEXT, 256)],
    }


def _z_image_stack(name: str, last: str) -> dict[str, Any]:
    return {
        f"{name}.0": {"x": ContextParallelInput(split_dim=1, expected_dims=3)},
        f"{name}.*": {
            "freqs_cis": ContextParallelInput(split_dim=1, expected_dims=3),
            "attn_mask": ContextParallelInput(split_dim=1, expected_dims=2),
        },
        last: ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


@dataclass(frozen=True)
class Shape:
    """A family's shape, and the plan of diffusers for it."""

    model: Callable[[], Any]
    inputs: Callable[[int, int], dict[str, Any]]
    cp_plan: dict[str, Any]


SHAPES = {
    "qwen-image": Shape(qwen_image, qwen_image_inputs, QwenImageTransformer2DModel._cp_plan),
    "wan": Shape(wan, wan_inputs, WanTransformer3DModel._cp_plan),
    "z-image": Shape(
        z_image, z_image_inputs,
        _z_image_stack("noise_refiner", "noise_refiner.1") | _z_image_stack("context_refiner", "context_refiner.1")
        | _z_image_stack("layers", "all_final_layer.2-1"),
    ),
}  # fmt: skip


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description="Forward time of one transformer, ours against diffusers' own.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[900, 2000])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    arguments = parser.parse_args()
    print(f"{arguments.repeats} turns, {os.cpu_count()} cores, {TEXT} text tokens; seconds of a forward, slower rank")
    pool = RankPool(size=2)
    for name in arguments.models:
        for tokens in arguments.tokens:
            ranks = pool.run(ParallelDegrees(ulysses_degree=2), compare, name, tokens, arguments.repeats)
            slower = {mode: [max(pair) for pair in zip(*(rank[mode] for rank in ranks), strict=True)] for mode in MODES}
            print(f"\n{name}, {tokens} image tokens          median    least    x ours")
            for mode in MODES:
                ratio = statistics.median(a / b for a, b in zip(slower[mode], slower[MODES[0]], strict=True))
                print(f"  {mode:<30} {statistics.median(slower[mode]):>7.3f} {min(slower[mode]):>8.3f} {ratio:>8.2f}")
    pool.stop()
    print_hook_cost()


def compare(ulysses: ParallelMesh, name: str, tokens: int, repeats: int) -> dict[str, list[float]]:
    """On one rank: seconds of each mode's forwards, turn by turn."""
    shape = SHAPES[name]
    ring = ParallelMesh.create(ParallelDegrees(ring_degree=2), device_type="cpu", timeout_s=60)
    models = {mode: seeded(shape.model) for mode in ("ours", "ours ring", "diffusers", "anything", "plain")}
    parallelize(models["ours"], ulysses)
    parallelize(models["ours ring"], ring)
    context_parallel(models["diffusers"], shape.cp_plan, ulysses_degree=2)
    context_parallel(models["anything"], shape.cp_plan, ulysses_degree=2, ulysses_anything=True)
    height = int(tokens**0.5) // 2 * 2
    torch.manual_seed(1)
    inputs = shape.inputs(height, tokens // height)

    def parallel(model: str) -> float:
        return timed(lambda: models[model](**inputs, return_dict=False))

    def alone(threads: int) -> float:
        torch.set_num_threads(threads)
        seconds = timed(lambda: models["plain"](**inputs, return_dict=False)) if dist.get_rank() == 0 else 0.0
        torch.set_num_threads(1)
        return seconds

    runs: dict[str, Callable[[], float]] = {
        MODES[0]: lambda: parallel("ours"),
        MODES[1]: lambda: parallel("ours ring"),
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


def print_hook_cost() -> None:
    """Hooks and seam on one process, where nothing is exchanged: measured on a narrow model, in which they show."""
    torch.set_num_threads(1)
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    narrow = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=5, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    inputs = qwen_image_inputs(4, 4) | {"hidden_states": torch.randn(1, 16, 16)}
    inputs["encoder_hidden_states"] = torch.randn(1, TEXT, 16)
    extra = []
    with torch.no_grad():
        for turn in range(500):
            plain = timed(lambda: narrow(**inputs))
            hooks = apply_sequence_parallel(narrow, QWEN_IMAGE.sp_plan, mesh)
            release = bind_attention(narrow, find_attention(narrow, QWEN_IMAGE), hooks.context)
            hooked = timed(lambda: narrow(**inputs))
            release()
            hooks.remove()
            if turn > 50:
                extra.append(hooked - plain)
        wide = seeded(qwen_image)
        inputs = qwen_image_inputs(30, 30)
        forward = statistics.median(timed(lambda: wide(**inputs)) for _ in range(3))
    cost = statistics.median(extra)
    print(f"\nhooks and seam of 5 layers, nothing exchanged: {cost * 1e6:.0f} us a forward,", end=" ")
    print(f"{cost / forward:.3%} of qwen-image's at 900 tokens ({forward:.2f} s, one thread)")


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def seeded(build: Callable[[], Any]) -> Any:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return build().eval()


def context_parallel(model: nn.Module, plan: dict[str, Any], **options: Any) -> None:
    """diffusers' context parallelism on CPU, which its own entry point refuses."""
    config = ContextParallelConfig(**options)
    mesh = dist.device_mesh.init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
    for module in model.modules():
        if isinstance(module, Attention | AttentionModuleMixin):
            module.processor._parallel_config = parallel
    apply_context_parallel(model, config, plan)


if __name__ == "__main__":
    main()
