"""Sequence parallelism on two CPU ranks: ours against diffusers' own, and against one process.

    python -m tests.benchmarks.sp_vs_diffusers [--repeats 21] [--tokens 800 1984] [--models qwen-image wan z-image]
        [--against ...] [--steps] [--skip-hooks]

Transformers of about 100 million parameters with random weights, in the shape of three families; two gloo ranks with
one thread each, each on a core of its own. In each turn our mode (Ulysses) is paired with every other: both run one
after the other, and change places from turn to turn. The table has, for each other mode,

    ms          median of its forwards, on the slower rank
    ours / it   median over the turns of the ratio within a pair: below 1 ours is faster
    95 %        where that median lies, by bootstrap: resampling the turns
    middle half of the ratios
    processor   the same median for the processor time of both ranks together, which leaves out waiting and suffers less
                from other work on the machine

The first row pairs ours with a second copy of itself. Its ratio must be 1; how far its interval reaches from 1 is what
the run can tell apart, and the last line says whether that is 2 %. diffusers has no plan for Z-Image; it is given ours.

With `--steps` the unit is a guided step in place of one forward. Ours is that of a serving gang: at a timestep that an
earlier request had too, so its modulation is kept; both prompts, which are of one length, in one forward up to
`BATCHED_TOKENS` on a rank. diffusers' pipelines make two forwards.
At last: what hooks and seam cost where nothing is exchanged.
"""

import argparse
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
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

from deploy.activations import BATCHED_TOKENS
from sp_core.attention.diffusers_backend import bind_attention
from sp_core.attention.discovery import find_attention
from sp_core.degrees import ParallelDegrees
from sp_core.hooks import apply_sequence_parallel
from sp_core.mesh import ParallelMesh
from sp_core.models.qwen_image import QWEN_IMAGE
from sp_core.parallelize import parallelize
from sp_core.shared_modulation import same_timestep
from sp_core.verify.rank_pool import RankPool
from tests.support.guided import batched_step, guided_step

TEXT = 64
CONTROL, RIVALS = "ours again", ("diffusers, ulysses 2", "diffusers, anything 2")
OTHERS = (CONTROL, *RIVALS, "ours, ring 2", "1 thread", "2 threads")
RESOLVED = 0.02
"""The difference that a run is meant to tell apart."""

Run = tuple[float, float]
"""Seconds of one forward, or step, on one rank: of the clock, of the processor."""

Pair = tuple[Run, Run]
"""One of ours, and one of another mode, next to each other."""


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
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--tokens", type=int, nargs="+", default=[800, 1984])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--against", nargs="+", default=[CONTROL, *RIVALS], choices=OTHERS, metavar="MODE")
    parser.add_argument("--steps", action="store_true", help="guided steps in place of forwards")
    parser.add_argument("--skip-hooks", action="store_true")
    chosen = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{chosen.repeats} turns, {os.cpu_count()} cores, load {load:.1f} at the start; {TEXT} text tokens")
    pool = RankPool(size=2)
    for name in chosen.models:
        for tokens in chosen.tokens:
            arguments = (name, tokens, chosen.repeats, list(chosen.against), chosen.steps)
            ranks = pool.run(ParallelDegrees(ulysses_degree=2), compare, *arguments)
            print(f"\n{name + f', {tokens} image tokens':<32} ms  ours / it       95 %      middle half  processor")
            report(ranks)
    pool.stop()
    if not chosen.skip_hooks:
        print_hook_cost()


def report(ranks: list[dict[str, list[Pair]]]) -> None:
    """Print the table of one model and length."""
    found: dict[str, tuple[float, float, float]] = {}
    for mode in ranks[0]:
        by_turn = list(zip(*(rank[mode] for rank in ranks), strict=True))
        clock = [tuple(max(rank[side][0] for rank in turn) for side in (0, 1)) for turn in by_turn]
        processor = [tuple(sum(rank[side][1] for rank in turn) for side in (0, 1)) for turn in by_turn]
        ratios, of_processor = ([ours / its for ours, its in pairs] for pairs in (clock, processor))
        found[mode] = (statistics.median(ratios), *interval(ratios))
        first, _, third = statistics.quantiles(ratios, n=4)
        middle, low, high = found[mode]
        print(
            f"  {mode:<24} {1e3 * statistics.median(its for _, its in clock):>8.1f} {middle:>10.3f}"
            f"  {low:.3f} - {high:.3f}  {first:.3f} - {third:.3f} {statistics.median(of_processor):>10.3f}",
            flush=True,
        )
    if CONTROL in found:
        off = max(abs(end - 1) for end in found[CONTROL][1:])
        print(f"  told apart: {off:.1%}" + ("" if off <= RESOLVED else ", which is too much: more turns, or less load"))


def interval(ratios: list[float]) -> tuple[float, float]:
    """Where the median lies in 95 % of 2000 samples, drawn with replacement."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def compare(
    ulysses: ParallelMesh, name: str, tokens: int, turns: int, against: list[str], steps: bool
) -> dict[str, list[Pair]]:
    """On one rank: each mode's forwards or steps, turn by turn, paired with ours."""
    shape = SHAPES[name]
    branches = guided_branches(name, tokens)
    alone = {"1 thread": 1, "2 threads": 2}
    models = {mode: seeded(shape.model) for mode in ("ours", *against)}
    ring = ParallelMesh.create(ParallelDegrees(ring_degree=2), device_type="cpu", timeout_s=60)
    for mode, model in models.items():
        if mode in RIVALS:
            context_parallel(model, shape.cp_plan, ulysses_degree=2, ulysses_anything=mode == RIVALS[1])
        elif mode not in alone:
            parallelize(model, ring if mode == "ours, ring 2" else ulysses)

    def forward_or_step(mode: str) -> None:
        if not steps:
            models[mode](**branches[0], return_dict=False)
        elif mode in RIVALS or mode in alone:
            guided_step(models[mode], branches, ulysses.axis("cfg"))
        elif tokens // dist.get_world_size() > BATCHED_TOKENS:
            with same_timestep(0.5):
                guided_step(models[mode], branches, ulysses.axis("cfg"))
        else:
            with same_timestep(0.5):
                _, why_apart = batched_step(models[mode], branches)
            assert not why_apart, why_apart

    def run(mode: str) -> Run:
        dist.barrier()
        if mode in alone and dist.get_rank():
            return 0.0, 0.0
        with on_cores(alone.get(mode, 1)):
            began = time.process_time()
            seconds = timed(lambda: forward_or_step(mode))
            return seconds, time.process_time() - began

    pairs: dict[str, list[Pair]] = {mode: [] for mode in against}
    gc.disable()  # a collection would hit one side of a pair
    with torch.no_grad():
        for turn in range(-2, turns):  # the first two warm up
            for mode in against:
                if turn % 2:
                    theirs, ours = run(mode), run("ours")
                else:
                    ours, theirs = run("ours"), run(mode)
                if turn >= 0:
                    pairs[mode].append((ours, theirs))
            gc.collect()
    gc.enable()
    return pairs


def guided_branches(name: str, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of a model's forward with two prompts of one length."""
    height = next(each for each in range(int(tokens**0.5), 0, -1) if tokens % each == 0)
    torch.manual_seed(1)
    first, second = (SHAPES[name].inputs(height, tokens // height) for _ in range(2))
    prompt = "cap_feats" if name == "z-image" else "encoder_hidden_states"
    return first, first | {prompt: second[prompt]}


CORES = sorted(os.sched_getaffinity(0))


@contextmanager
def on_cores(threads: int) -> Iterator[None]:
    """Inside, torch computes with so many threads: one, on a core of this rank's own, or several, on all cores."""
    own = {CORES[dist.get_rank() % len(CORES)]}
    for task in Path("/proc/self/task").iterdir():  # gloo's threads too
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(task.name), own if threads == 1 else set(CORES))
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)


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
