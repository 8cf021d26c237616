"""What previews add to the denoising: the same request with and without them, in turn, on one rank.

    python -m tests.benchmarks.previews [--repeats N] [--steps N] [--step-ms MS] [--size PIXELS]

The demo model of Qwen-Image, whose forward takes so many milliseconds. `waits`: the host sleeps meanwhile, as beside a
GPU. `computes`: it multiplies matrices on as many threads as torch has. The seconds are those of the steps, so what a
preview takes of the rank's thread and of its processor both count. What a report takes of Ray is not in them. The share
is the median over the pairs: three in a minute and a half; nine tell a quarter of a percent. The VAE has one pair: a
CPU decodes for seconds, which no number of pairs makes a small share.
"""

import argparse
import contextlib
import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from tests.support.deployments import model
from workers.demo_models.writer import write_demo_model
from workers.gang.rank import Rank
from workers.messages import Drawn, GenerationRequest, PreviewOptions
from workers.model.loader import load_model

KINDS = {
    "3, linear": PreviewOptions(count=3),
    "every 3 steps, linear": PreviewOptions(every=3),
    "3, by the VAE": PreviewOptions(count=3, decoder="vae"),
}


def main(arguments: list[str]) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="What previews add to the denoising.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--size", type=int, default=512)
    given = parser.parse_args(arguments)
    print(f"{given.steps} steps of {given.step_ms:g} ms, {given.size} x {given.size} pixels, {given.repeats} pairs\n")
    print("| host | previews | ms without | ms with | added % |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_demo_model(Path(folder), "qwen-image")
        rank, request = warm(Path(folder), given.size, given.steps)
        for (host, work), (kind, options) in itertools.product(HOSTS.items(), KINDS.items()):
            with forwards_that(work(given.step_ms / 1e3), rank._loaded.pipeline.transformer):
                spent(rank, request)
                asked = replace(request, previews=options)
                repeats = 1 if options.decoder == "vae" else given.repeats
                pairs = [(spent(rank, request), spent(rank, asked)) for _ in range(repeats)]
            without, with_them = (statistics.median(side) for side in zip(*pairs, strict=True))
            added = statistics.median((b - a) / a for a, b in pairs)
            print(f"| {host} | {kind} | {without * 1e3:.1f} | {with_them * 1e3:.1f} | {added * 100:.2f} |", flush=True)


def warm(folder: Path, size: int, steps: int) -> tuple[Rank, GenerationRequest]:
    """A rank that has learned the colors of its latents, and the request that is measured."""
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=600)
    rank = Rank(0, model(folder))
    rank._use(load_model(rank.model, mesh))
    request = GenerationRequest("b", "demo", "a cup of coffee", size, size, steps, seed=1)
    with rank._loaded.colors.warm_up():
        spent(rank, replace(request, num_inference_steps=1))
    return rank, request


def waits(seconds: float) -> Callable[[], None]:
    """The host sleeps."""
    return lambda: time.sleep(seconds)


def computes(seconds: float) -> Callable[[], None]:
    """The host multiplies matrices: as many as take that long when nothing else runs."""
    matrix = torch.rand(256, 256)

    def multiply(count: int) -> None:
        for _ in range(count):
            matrix @ matrix

    before = time.perf_counter()
    multiply(200)
    count = max(1, round(seconds / (time.perf_counter() - before) * 200))
    return lambda: multiply(count)


HOSTS = {"waits": waits, "computes": computes}


@contextlib.contextmanager
def forwards_that(work: Callable[[], None], transformer: Any) -> Iterator[None]:
    """The transformer's first forward is its own; the others do this work instead, and return the same."""
    forward, kept = transformer.forward, []

    @functools.wraps(forward)  # the pipeline asks for its parameters
    def replaced(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(forward(*args, **kwargs))
        work()
        return kept[0]

    transformer.forward = replaced
    try:
        yield
    finally:
        transformer.forward = forward


def spent(rank: Rank, request: GenerationRequest) -> float:
    """Seconds of all steps of a request."""
    took = 0.0
    for report in rank.generate(request):
        if isinstance(report, Drawn):
            took = sum(report.took.step_seconds)
            rank.answer(report.request_id)
    return took


if __name__ == "__main__":
    logging.set_verbosity_error()  # it says of each request that guiders are new
    main(sys.argv[1:])
