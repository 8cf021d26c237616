"""What the replacements of a family's parts save: a model with and without each, in turns, eager and compiled.

    python -m tests.benchmarks.replacements [--repeats N] [--tokens 800] [--models qwen-image z-image]
        [--modes eager compiled] [--device cpu|cuda] [--dtype float32]

One process, one thread. On CPU milliseconds of the processor, which other work on the machine disturbs less than those
of the clock. Transformers of about 100 million parameters, as in `sp_vs_diffusers`. Rotation: one forward. Modulation:
one guided step of two forwards, with few tokens, in which it shows; "kept": at a timestep that was seen before.
"Before" and "after" take turns in one run, in shuffled order; the table has the medians, the middle half of the times,
and the median of the ratios of one turn. The rotation alone, of one stream's queries, says why eager mode keeps the
complex product; the row of 60 products, why the weights of all modulations are not stacked for a single one.

The last rows are no replacement: what merging a hop of the ring costs by separate operations, as it was once, and in
one pass over the outputs. The part of a new chunk, of 24 heads of 128 in the kernel's dtype, is merged into what there
is, in fp32.
"""

import argparse
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch.nn.functional import linear

from sp_core import kernels, real_rotation
from sp_core.degrees import ParallelDegrees
from sp_core.kernels import Partial
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.shared_modulation import same_timestep
from tests.benchmarks.sp_vs_diffusers import SHAPES, seeded

Pair = tuple[Callable[[], Any], Callable[[], Any]]

Times = list[float]
"""Milliseconds of each call."""


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Time of a forward with and without replaced parts.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=800)
    parser.add_argument("--models", nargs="+", default=["qwen-image", "z-image"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    chosen = parser.parse_args()
    torch.set_default_dtype(getattr(torch, chosen.dtype))
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    where = f"{chosen.device}, {chosen.dtype}, load {os.getloadavg()[0]:.1f}"
    print(f"{chosen.repeats} turns, {chosen.tokens} image tokens; {where}; milliseconds")
    print(f"{'':<36} {'before':>8} {'middle half':>17} {'after':>8} {'middle half':>17} {'after/before':>13}")
    turns = chosen.repeats

    def row(what: str, turns: int, make: Callable[..., Pair], *args: Any) -> None:
        with torch.device(chosen.device):
            pair = make(*args)
        report(what, *in_turns(pair, turns, chosen.device))

    for how in chosen.modes:
        compiles = how == "compiled"
        row(f"rotation alone, {how}", 10 * turns, rotation_alone, chosen.tokens, compiles)
        for name in chosen.models:
            row(f"{name}, rotation, {how}", turns, rotation, name, chosen.tokens, compiles)
            for kept in (False, True):
                what = f"{name}, modulation{' kept' * kept}, {how}"
                row(what, 2 * turns, modulation, name, compiles, 0.5 if kept else None)
    row("60 products or one, 1 row", 2 * turns, stacked)
    for dtype, tokens in itertools.product((torch.float32, torch.bfloat16), (1024, 4096)):
        row(f"ring merge, {tokens} tokens, {str(dtype).removeprefix('torch.')}", 2 * turns, merges, tokens, dtype)


def rotation_alone(tokens: int, compiles: bool) -> Pair:
    """The complex product and the real one, for queries of 12 heads of 64."""
    torch.manual_seed(0)
    query, at = torch.randn(1, tokens, 12, 64), torch.rand(tokens, 1, 32, dtype=torch.float32)
    rotations = torch.polar(torch.ones_like(at), at)
    pairs = torch.view_as_real(rotations)

    def by_complex(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        return (
            torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rotations)
            .flatten(3)
            .type_as(x)
        )

    first, second = (torch.compile(f, fullgraph=True) if compiles else f for f in (by_complex, real_rotation.rotate))
    return lambda: first(query, rotations), lambda: second(query, pairs)


def modulation(name: str, compiles: bool, timestep: float | None) -> Pair:
    """A guided step whose forwards modulate by themselves, and one whose forwards share, of one model. A timestep lets
    it keep what it computes."""
    torch.manual_seed(1)
    inputs = SHAPES[name].inputs(8, 8)
    model = seeded(SHAPES[name].model)
    parallelize(
        model, ParallelMesh.create(ParallelDegrees(), device_type=torch.get_default_device().type, timeout_s=60)
    )
    if compiles:
        model.compile_repeated_blocks(fullgraph=True)

    def step(scope: Callable[[], AbstractContextManager[None]]) -> None:
        with scope():
            for _ in range(2):
                model(**inputs, return_dict=False)

    return lambda: step(nullcontext), lambda: step(lambda: same_timestep(timestep))


def stacked() -> Pair:
    """One embedding through 60 layers of 768 to 4608 one by one, and through their weights stacked, 850 MB."""
    weights = torch.randn(60 * 4608, 768)
    layers, embedding = weights.split(4608), torch.randn(1, 768)
    return lambda: [linear(embedding, weight) for weight in layers], lambda: linear(embedding, weights)


def merges(tokens: int, dtype: torch.dtype) -> Pair:
    """One hop each way; what is merged is written over, so it stays a mean of the two."""
    shape = (1, tokens, 24, 128)
    before, after = (
        Partial(torch.randn(shape, dtype=torch.float32), torch.randn(shape[:3], dtype=torch.float32)) for _ in range(2)
    )
    part = Partial(torch.randn(shape).to(dtype), torch.randn(shape[:3], dtype=torch.float32))
    return lambda: by_separate_operations(before, part), lambda: kernels.merge(after, part)


def by_separate_operations(one: Partial, other: Partial) -> Partial:
    """Two weights, two products and a sum."""
    both = torch.logaddexp(one.lse, other.lse)
    reference = both.masked_fill(torch.isneginf(both), 0)
    weight, other_weight = (torch.exp(lse - reference).unsqueeze(-1) for lse in (one.lse, other.lse))
    return Partial(one.output.float() * weight + other.output.float() * other_weight, both)


def rotation(name: str, tokens: int, compiles: bool) -> Pair:
    """A forward of the plain model, and of one whose parts are replaced."""
    height = int(tokens**0.5) // 2 * 2
    torch.manual_seed(1)
    inputs = SHAPES[name].inputs(height, tokens // height)
    plain, replaced = (seeded(SHAPES[name].model) for _ in range(2))
    parallelize(
        replaced, ParallelMesh.create(ParallelDegrees(), device_type=torch.get_default_device().type, timeout_s=60)
    )
    if compiles:
        for model in (plain, replaced):
            model.compile_repeated_blocks(fullgraph=True)
    return lambda: plain(**inputs, return_dict=False), lambda: replaced(**inputs, return_dict=False)


def report(what: str, before: Times, after: Times) -> None:
    """Print the row of one comparison."""
    ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
    columns = (f"{statistics.median(each):>8.2f} {middle_half(each):>17}" for each in (before, after))
    print(f"{what:<36} {' '.join(columns)} {ratio:>13.3f}", flush=True)


def in_turns(
    pair: Pair, turns: int, device: str, clock: bool = False, before: Callable[[], Any] | None = None
) -> tuple[Times, Times]:
    """Milliseconds of each call of both; the first two turns warm up.

    Args:
        pair: the two calls.
        turns: how often each is measured.
        device: where they compute.
        clock: on CPU too, time is that of the clock.
        before: called ahead of each, and not measured.
    """
    shuffled = random.Random(0)
    found: tuple[Times, Times] = ([], [])
    for turn in range(turns + 2):
        for which in shuffled.sample((0, 1), 2):
            if before:
                before()
            took = milliseconds(pair[which], device, clock)
            if turn >= 2:
                found[which].append(took)
    return found


def milliseconds(call: Callable[[], Any], device: str, clock: bool = False) -> float:
    """Of the processor on CPU, unless the clock is asked for; of the clock until the device is done elsewhere."""
    if device == "cpu":
        now = time.perf_counter if clock else time.process_time
        began = now()
        call()
        return (now() - began) * 1e3
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def middle_half(times: Times) -> str:
    """Between the quartiles."""
    first, _, third = statistics.quantiles(times, n=4)
    return f"{first:.2f} - {third:.2f}"


if __name__ == "__main__":
    main()
