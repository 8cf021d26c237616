"""What a layer costs on a GPU besides arithmetic, for all families and layouts, counted on fake CUDA tensors.

    python -m tests.benchmarks.fake_cuda [--families "wan;flux"] [--layouts u2,r2]

Needs no GPU, and takes no memory: full-width transformers, of which only shapes exist. Prints two tables in Markdown.
A layer is the difference between a model with two layers of each kind and one with one: where a family has two kinds of
blocks, it is one of each. Of the first rank, which never has less to do than others.

    kernels         operators that start one: without compilation, each is a launch by the host
    elementwise     what they read and write, matrix products and attention left out: the time of a layer that
                    arithmetic does not explain, at the bandwidth of the memory
    sent            to other ranks, as `tests.support.traffic` counts
    attention       calls of each kernel: cudnn is a fast one, efficient is slower and takes masks
    waits           of the host for the device, in one whole forward: each empties the queue of kernels

A second table has a layer of a guided step whose branches take a forward each, and of one whose branches share one
(`batch_guidance`): kernels, and how often and how much is sent. A third has the waits of whole requests, a step and its
scheduler included, of the demo models on two ranks.
"""

import argparse
import itertools
import os
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import diffusers

from sp_core.degrees import ParallelDegrees
from sp_core.verify.rank_pool import RankPool
from tests.support.deployments import model
from tests.support.fake_cuda.families import FULL_WIDTH
from tests.support.fake_cuda.forward import Run, Watched, batched, guided, watch_forward
from tests.support.fake_cuda.request import REQUESTS, draw_on_pretended_cuda
from workers.demo_models.writer import write_demo_model

GUIDED = ("qwen-image", "z-image", "wan")
"""Families whose branches may share a forward, with prompts of one length."""

LAYOUTS = {
    "1": ParallelDegrees(),
    "u2": ParallelDegrees(ulysses_degree=2),
    "r2": ParallelDegrees(ring_degree=2),
    "t2": ParallelDegrees(tensor_parallel_size=2),
    "u4": ParallelDegrees(ulysses_degree=4),
    "u2r2": ParallelDegrees(ulysses_degree=2, ring_degree=2),
    "u8": ParallelDegrees(ulysses_degree=8),
    "u4r2": ParallelDegrees(ulysses_degree=4, ring_degree=2),
}


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--families", default=";".join(FULL_WIDTH), help="names, separated by semicolons; empty: only the waits"
    )
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    chosen = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    print(
        "| family | layout | kernels a layer | elementwise MB a layer | sent MB a layer | attention a layer | waits |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in filter(None, chosen.families.split(";")):
        for layout in chosen.layouts.split(","):
            print(f"| {name} | {layout} | {' | '.join(of_a_layer(name, LAYOUTS[layout]))} |", flush=True)
    print()
    print_guided([name for name in chosen.families.split(";") if name in GUIDED], chosen.layouts.split(","))
    print()
    print_waits()


def of_a_layer(name: str, degrees: ParallelDegrees) -> list[str]:
    """The columns of one row."""
    try:
        one, two = (watch_forward(FULL_WIDTH[name], degrees, rank=0, layers=layers) for layers in (1, 2))
    except ValueError as error:
        if "no tensor-parallel plan" in str(error):
            return ["no tensor plan", "", "", "", ""]
        raise
    attention = two.forward.attention - one.forward.attention
    return [
        f"{two.forward.kernels.total() - one.forward.kernels.total()}",
        f"{(two.forward.moved - one.forward.moved) / 1e6:.0f}",
        f"{(_sent(two) - _sent(one)) / 1e6:.1f}",
        ", ".join(f"{count} {kernel}" for kernel, count in sorted(attention.items())),
        f"{two.forward.waits.total()}",
    ]


def print_guided(names: list[str], layouts: list[str]) -> None:
    """A layer of a guided step, by two forwards and by one."""
    columns = "kernels a layer | exchanges a layer | sent MB a layer | attention a layer"
    print(f"| family | layout | forwards a step | {columns} |")
    print("|---|---|---|---|---|---|---|")
    for name, layout in itertools.product(names, layouts):
        for forwards, run in ((2, guided), (1, batched)):
            found = " | ".join(of_a_guided_layer(name, LAYOUTS[layout], run))
            print(f"| {name} | {layout} | {forwards} | {found} |", flush=True)


def of_a_guided_layer(name: str, degrees: ParallelDegrees, run: Run) -> list[str]:
    """The columns of one row."""
    one, two = (watch_forward(FULL_WIDTH[name], degrees, rank=0, layers=layers, run=run) for layers in (1, 2))
    sent = _sent(two) - _sent(one)
    attention = two.forward.attention - one.forward.attention
    return [
        f"{two.forward.kernels.total() - one.forward.kernels.total()}",
        f"{two.forward.exchanges.total() - one.forward.exchanges.total()}",
        f"{sent / 1e6:.1f}",
        ", ".join(f"{count} {kernel}" for kernel, count in sorted(attention.items())),
    ]


def _sent(watched: Watched) -> float:
    assert not watched.refused, watched.refused
    return float(sum(watched.sent.values()))


def print_waits() -> None:
    """Of a step of a whole request, and where."""
    print("| family | waits before the loop | a step | after it | where in a step |")
    print("|---|---|---|---|---|")
    pool, degrees = RankPool(2), ParallelDegrees(ulysses_degree=2)
    with tempfile.TemporaryDirectory() as folder:
        for family, request in REQUESTS.items():
            write_demo_model(Path(folder) / family, family)
            spec = model(Path(folder) / family, ulysses_degree=2)
            _, seen = pool.run(degrees, draw_on_pretended_cuda, spec, request)[0]
            phases: Counter[str] = Counter()
            for (phase, _), count in seen.waits.items():
                phases[phase] += count
            steps = {line: count / (request.num_inference_steps - 1) for line, count in seen.waits_in("step").items()}
            before = sum(phases[phase] for phase in ("encode", "share_encoded", "prepare"))
            where = "; ".join(f"{count:.3g} x {line}" for line, count in steps.items())
            print(f"| {family} | {before} | {sum(steps.values()):.3g} | {phases['finish']} | {where} |", flush=True)
    pool.stop()


if __name__ == "__main__":
    main()
