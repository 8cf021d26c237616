"""Part 2: does a GPU draw what a CPU draws? The demo model of every pipeline that spray serves.

Each is asked for what its proof asks for. One rank on the GPU stands beside one on the CPU, both in fp32; in bfloat16
it only has to draw. Then some have their blocks compiled, and recorded as CUDA graphs: they must draw the same as
without, and the same again after another request. At the end two ranks share the GPU, over gloo.

Several processes do this side by side, so seconds are those of a busy machine.
"""

import multiprocessing
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from deploy.model_sections import WarmupShape
from deploy.model_spec import ModelSpec
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify import examples
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BLIND, closing_pool
from tests.benchmarks.gpu.checks import OF_A_GPU
from tests.benchmarks.gpu.part import LeftOut, Part
from tests.benchmarks.gpu.ranks import on_ranks
from tests.benchmarks.gpu.staged import name_what_torch_lacks
from workers.demo_models.pipelines import requests_of, served
from workers.demo_models.writer import write_demo_model
from workers.gang import self_test
from workers.messages import GenerationRequest
from workers.model.loader import load_model
from workers.model.torch_internals import recordings_refused
from workers.pipeline_proof import Made, answer, apart, draw

LATENTS = 1e-3
"""Largest difference of a GPU's latents from a CPU's, times max(1, max|reference|), after all steps."""

PIXELS = 2
"""Steps of 1/255 by which pixels may differ."""

PROCESSES = 7
"""Side by side on one GPU."""

POOLS = 4
"""Of two ranks each, side by side."""

COMPILED = ("z-image", "qwen-image", "flux", "wan")
"""Families whose demo models are compiled."""

GRAPHS_BAR = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest difference of compiled latents from eager ones. Compiled code rounds to bfloat16 less often."""

SAMPLES = "GlmImagePipeline"

FAKE = ("ZImagePipeline",)

TWO = ParallelDegrees(ulysses_degree=2)

Said = tuple[object, ...]


def run(part: Part) -> None:
    """Write the tables."""
    names = [name for name in (FAKE if part.fake else served()) if part.only.lower() in name.lower()]
    device = part.device.type
    with tempfile.TemporaryDirectory(prefix="spray-pipelines-") as place:
        _alone(part, Path(place), device, names)
        part.table.begin(
            "Two ranks",
            f"In fp32, {'on one GPU' if device == 'cuda' else 'on the CPU'}, over gloo, beside one rank there. Latents "
            f"may differ by {LATENTS:g} at most; with attention kept local by more than {BLIND:g}.",
            ("pipeline", "layout", "latents", "pixels", "attention kept local", "s"),
        )
        with ExitStack() as stack:
            pools = queue.SimpleQueue[RankPool]()
            for _ in range(1 if part.fake else POOLS):
                pools.put(stack.enter_context(closing_pool(2, "cpu")))
            threads = stack.enter_context(ThreadPoolExecutor(1 if part.fake else POOLS))
            shared = {name: threads.submit(_on_two, part, pools, Path(place, name), name) for name in names}
            for name, future in shared.items():
                part.row((name, TWO), future.result)


def _alone(part: Part, folder: Path, device: str, names: Sequence[str]) -> None:
    """What one rank draws: each pipeline, then with compiled blocks."""
    cases = [
        (family, dtype, graphs)
        for family in (COMPILED[:1] if part.fake else COMPILED)
        for dtype in ((torch.float32,) if part.fake else (torch.float32, torch.bfloat16))
        for graphs in (False, True)
        if device == "cuda" or not graphs
    ]
    count = 1 if part.fake else min(PROCESSES, max(1, (os.cpu_count() or 2) // 2))
    with _Processes(count, device, part.deadline) as processes:
        drawn = {name: processes.submit(compare, folder / name, name, device) for name in names}
        compiled = {case: processes.submit(compiled_draw, folder, device, *case) for case in cases}
        part.table.begin(
            "Pipelines",
            f"Demo models in fp32 on the {device}; one rank. Largest difference from one rank on "
            f"the CPU: of latents, in units of max(1, max/reference/), at most {LATENTS:g}; of pixels, at most "
            f"{PIXELS}/255. In bfloat16 it is only reported.",
            ("pipeline", "requests", "latents", "pixels", "bfloat16 latents", "bfloat16 pixels", "s"),
        )
        for name, found in drawn.items():
            part.row((name,), found.result)
        part.table.begin(
            "Compiled blocks",
            "Demo models; largest difference of latents from those without compiling; then the same request again "
            "after another one.",
            ("family", "dtype", "CUDA graphs", "differs by", "again", "s"),
        )
        for (family, dtype, graphs), found in compiled.items():
            part.row((family, str(dtype).removeprefix("torch."), graphs), found.result)


class _Processes:
    """Processes that work side by side. One that dies fails its own work, and is replaced.

    Args:
        count: of them.
        device: that they use.
        deadline: by `time.monotonic`; work that would begin later, or has not ended by then, is left out.
    """

    def __init__(self, count: int, device: str, deadline: float) -> None:
        self._device, self._deadline = device, deadline
        self._threads = ThreadPoolExecutor(count)
        self._own = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def submit(self, work: Callable[..., Said], *args: object) -> Future[Said]:
        """Do it as soon as a process is free."""
        return self._threads.submit(self._do, work, *args)

    def _do(self, work: Callable[..., Said], *args: object) -> Said:
        left = self._deadline - time.monotonic()
        if left < 0:
            raise LeftOut("the time of this part is over")
        if not hasattr(self._own, "process"):
            spawn = multiprocessing.get_context("spawn")
            self._own.process = ProcessPoolExecutor(1, spawn, _begin, (self._device,))
        try:
            said: Said = self._own.process.submit(work, *args).result(left)
        except TimeoutError:
            raise LeftOut("the time of this part is over") from None
        except BrokenProcessPool:
            del self._own.process
            raise RuntimeError("its process died") from None
        return said


def _on_two(part: Part, pools: "queue.SimpleQueue[RankPool]", folder: Path, pipeline: str) -> Said:
    if time.monotonic() > part.deadline:
        raise LeftOut("the time of this part is over")
    if not folder.exists():
        raise LeftOut("its demo model was not written")
    began, pool = time.monotonic(), pools.get()
    try:
        request, device = requests_of(pipeline)[0], part.device.type
        (reference,) = on_ranks(pool, ParallelDegrees(), device, made, folder, request)
        found = on_ranks(pool, TWO, device, made, folder, request)
        kept = on_ranks(pool, TWO, device, made, folder, request, True)
    finally:
        pools.put(pool)
    latents, pixels = max(_apart(each, reference) for each in found), apart(found[0][1], reference[1])
    local = max(_apart(each, reference) for each in kept)
    if not (latents <= LATENTS and pixels <= PIXELS):
        raise ValueError(f"differs from one rank: latents by {latents:.1e}, pixels by {pixels}/255")
    if not local > BLIND:
        raise ValueError(f"proves nothing: with attention kept local it differs by only {local:.1e}")
    return f"{latents:.1e}", pixels, f"{local:.1e}", time.monotonic() - began


def made(mesh: ParallelMesh, folder: Path, request: GenerationRequest, local: bool = False) -> Made:
    """On a rank: what it makes, on the CPU, so that it can be sent."""
    _begin(mesh.device.type)
    latents, pixels = answer(mesh, folder, request, exact=True, local=local)
    return latents.cpu(), pixels


def _begin(device: str) -> None:
    """In each process: exact sums, few threads, quiet."""
    name_what_torch_lacks()
    examples.quiet_diffusers()
    torch.set_num_threads(2)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if device == "cuda":
        self_test.BAR = OF_A_GPU


def compare(folder: Path, pipeline: str, device: str) -> Said:
    """A pipeline's demo model on a device, beside the CPU.

    Raises:
        ValueError: it draws something else.
    """
    began = time.monotonic()
    write_demo_model(folder, served()[pipeline], pipeline)
    if pipeline == SAMPLES and device != "cpu":
        raise LeftOut("it samples tokens, from other numbers on each kind of device")
    here, there = (ParallelMesh.create(ParallelDegrees(), device_type=each, timeout_s=60) for each in ("cpu", device))
    requests = requests_of(pipeline)
    latents, pixels, half, half_pixels = 0.0, 0, 0.0, 0
    for request in requests:
        reference = answer(here, folder, request, exact=True)
        found = answer(there, folder, request, exact=True)
        latents, pixels = max(latents, _apart(found, reference)), max(pixels, apart(found[1], reference[1]))
        if not (latents <= LATENTS and pixels <= PIXELS):
            raise ValueError(f"differs from the CPU: latents by {latents:.1e}, pixels by {pixels}/255")
        rounded = answer(there, folder, request, dtype="bfloat16")
        if not rounded[0].isfinite().all():
            raise ValueError("latents are not finite in bfloat16")
        half, half_pixels = max(half, _apart(rounded, reference)), max(half_pixels, apart(rounded[1], reference[1]))
    return len(requests), f"{latents:.1e}", pixels, f"{half:.1e}", half_pixels, time.monotonic() - began


def _apart(found: Made, reference: Made) -> float:
    return error(found[0].cpu().float(), reference[0].cpu().float())


def compiled_draw(folder: Path, device: str, family: str, dtype: torch.dtype, graphs: bool) -> Said:
    """A demo model with compiled blocks, beside the same without.

    Raises:
        ValueError: it draws something else, or something else again.
    """
    began = time.monotonic()
    place = folder / f"{family}-{dtype}-{graphs}"
    write_demo_model(place, family)
    pipeline = next(name for name, of in served().items() if of == family.replace("-", "_"))
    request = replace(requests_of(pipeline)[0], n=1)
    mesh = ParallelMesh.create(ParallelDegrees(), device_type=device, timeout_s=60)
    common: dict[str, Any] = {
        "name": "demo", "source": str(place), "device": device, "dtype": str(dtype).removeprefix("torch.")
    }  # fmt: skip
    shape = WarmupShape(width=request.width, height=request.height, num_frames=request.num_frames)
    refused = recordings_refused()
    eager = load_model(ModelSpec(**common), mesh)
    fast = load_model(ModelSpec(**common, compile=True, cuda_graphs=graphs, warmup_shapes=(shape,)), mesh)
    plain = draw(eager, request)
    another = replace(request, seed=request.seed + 1, prompt="a red car in the snow")
    for each in (request, another):  # a second length makes graphs for any length, which also serve the first
        draw(fast, each)
    first, other, again = (draw(fast, each) for each in (request, another, request))
    if refused := recordings_refused() - refused:
        raise ValueError(f"{refused} graphs were not recorded; torch's log says why")
    by, repeated = _apart(first, plain), _apart(again, first)
    if not by <= GRAPHS_BAR[dtype]:
        raise ValueError(f"differs by {by:.1e}")
    if repeated > 0:
        raise ValueError(f"the same request again differs by {repeated:.1e}")
    if _apart(other, plain) < 0.1:
        raise ValueError("another request draws the same: this proves nothing")
    return f"{by:.1e}", "the same", time.monotonic() - began
