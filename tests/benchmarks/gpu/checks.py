"""Part 1: is it right on a GPU? Tests, the probe of the groups, the same answer on every layout."""

import dataclasses
import importlib.util
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from sp_core.attention.region_attention import attention_kept_local
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.verify import examples
from sp_core.verify.alone import in_fp32, rounds
from sp_core.verify.divergence import tensors_of
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR, BLIND, closing_pool, difference, layouts
from tests.benchmarks.gpu.part import LeftOut, Part
from tests.benchmarks.gpu.ranks import on_ranks
from tests.benchmarks.gpu.staged import name_what_torch_lacks

TESTS = Path(__file__).resolve().parents[2]

BARS = {torch.float32: BAR, torch.bfloat16: 0.05}
"""Largest difference from one process, times max(1, max|reference|)."""

SERVED = ("qwen-image", "z-image", "flux", "wan")
"""Examples of the transformers that spray serves: on 8 ranks and in bf16 only these, to be done in time."""

WIDER: dict[str, dict[str, Any]] = {
    "qwen-image": {"attention_head_dim": 16, "axes_dims_rope": (8, 4, 4)},
    "flux": {"attention_head_dim": 16, "axes_dims_rope": (8, 4, 4)},
    "wan": {"attention_head_dim": 16},
}
"""Changes of the examples in bf16: kernels for it need head sizes that are multiples of 8."""

OF_A_GPU = 1e-4
"""The same on a GPU in fp32: it adds up in another order than a CPU, and for other shapes in another one again."""


def run(part: Part) -> None:
    """Write the tables."""
    examples.quiet_diffusers()
    part.table.begin("What is there", "Read, not measured.", ("what", "outcome"))
    part.row(("torch.distributed.all_gather_single, which sp_core calls",), lambda: (name_what_torch_lacks(),))
    part.row(("GPUs",), lambda: (torch.cuda.device_count(),))
    part.row(("NCCL",), _nccl)
    part.table.begin("Tests with the mark `gpu`", "`pytest -m gpu`.", ("file", "outcome", "s"))
    _tests(part)
    devices = 0 if part.fake else torch.cuda.device_count()
    worlds = [2] if part.fake else [n for n in (2, 4, 8) if n <= devices] or [2, 4, 8]
    over_nccl = devices > 1
    if devices == 1:
        said = "NCCL alone has one rank, which has no groups to probe. Several share the GPU, over gloo."
    else:
        said = "Over NCCL, a GPU for each rank." if over_nccl else "Over gloo, for want of GPUs."
    part.table.begin("Probe", said, ("layout", "outcome", "s"))
    if devices == 1:
        with closing_pool(1, "cuda") as pool:
            part.row(("1 rank on NCCL",), lambda: _probe(part, pool, ParallelDegrees()))
    with closing_pool(max(worlds), "cuda" if over_nccl else "cpu") as pool:
        for degrees in layouts(worlds[-1]):
            part.row((degrees,), partial(_probe, part, pool, degrees))
        _same_answer(part, pool, worlds)


def _nccl() -> Sequence[object]:
    if not torch.cuda.is_available():
        raise LeftOut("no GPU")
    return (".".join(str(number) for number in torch.cuda.nccl.version()),)


def _tests(part: Part) -> None:
    """One row for each file, so that a file that cannot be imported here costs only itself."""
    files = [file for file in sorted(TESTS.rglob("test_*.py")) if re.search(r"\bmark\.gpu\b", file.read_text())]
    if not files:
        part.table.row("-", "no test has the mark", "-")
    for file in files:
        part.row((file.relative_to(TESTS),), partial(_pytest, file, part.fake), needs_s=30)


def _pytest(file: Path, fake: bool) -> Sequence[object]:
    if importlib.util.find_spec("pytest") is None:
        raise LeftOut("pytest is not installed")
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider", str(file)]
    command += ["--collect-only", "--noconftest"] if fake else []  # the fixtures load much, and nothing is run
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=240)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    missing = re.search(r"No module named '(\w+)", done.stdout)
    if done.returncode and missing and importlib.util.find_spec(missing[1]) is None:
        raise LeftOut(f"the file imports {missing[1]}, which is not installed")
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-3:] or [done.stderr[-300:]]
        raise AssertionError("; ".join(failed)[:500])
    return lines[-1].strip("= "), time.monotonic() - began


def _probe(part: Part, pool: RankPool, degrees: ParallelDegrees) -> Sequence[object]:
    began = time.monotonic()
    said = on_ranks(pool, degrees, part.device.type, probe)
    return said[0], time.monotonic() - began


def probe(mesh: ParallelMesh) -> str:
    """On one rank: a sum over all ranks, then the product's own probe of every group, if this version has it."""
    total = torch.full((1,), float(dist.get_rank() + 1), device=mesh.device)
    dist.all_reduce(total)
    world = dist.get_world_size()
    if int(total) != world * (world + 1) // 2:
        raise ValueError(f"the sum of the ranks' numbers is {float(total)}")
    try:
        found = importlib.import_module("sp_core.probe")
    except ImportError:
        return "sums agree; sp_core.probe is not there"
    found.probe(mesh)
    return "sums agree; the probe passed"


def _same_answer(part: Part, pool: RankPool, worlds: Sequence[int]) -> None:
    where = "a GPU per rank, over NCCL" if pool.device_type == "cuda" else "all ranks on one GPU, over gloo"
    where = "on the CPU" if part.fake else where
    part.table.begin(
        "The same answer",
        f"Tiny transformers on their examples; {where}. Largest difference from one process, in units of "
        f"max(1, max/reference/); allowed are {BAR:g} in fp32, {BARS[torch.bfloat16]:g} in bf16, and {OF_A_GPU:g} "
        f"in fp32 on a GPU. With attention kept local it must be above {BLIND:g}.",
        ("transformer", "layout", "dtype", "inputs", "differs by", "attention kept local", "s"),
    )
    names = ["qwen-image"] if part.fake else list(examples.TINY)
    for name in names:
        part.row((name, "1 rank", "float32"), partial(_against_cpu, part, name))
    proofs = [(torch.float32, world, name) for world in worlds for name in names if world < 8 or name in SERVED]
    if not part.fake:  # last, because it proves less
        proofs += itertools.product([torch.bfloat16], worlds, SERVED)
    for dtype, world, name in proofs:
        for degrees in layouts(world):
            head = (name, degrees, str(dtype).removeprefix("torch."))
            part.row(head, partial(_compare, part, pool, degrees, name, dtype))


def _cells(name: str) -> list[examples.Cell]:
    """A few that differ most: ragged, masked, short, a batch of two."""
    wanted = [("uneven", "none", 1), ("uneven", "scattered", 2), ("even", "per row", 2), ("short", "none", 1)]
    return [cell for cell in wanted if examples.TINY[name].why_not(*cell) is None]


def _against_cpu(part: Part, name: str) -> Sequence[object]:
    began = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cells = _cells(name)
    answers = [forwards(name, cells, device, torch.float32) for device in (torch.device("cpu"), part.device)]
    by = max(difference([t.cpu() for t in there], here) for here, there in zip(*answers, strict=True))
    if not by <= OF_A_GPU:
        raise ValueError(f"differs from the CPU by {by:.1e}")
    return len(cells), f"{by:.1e}", "-", time.monotonic() - began


@torch.no_grad()
def forwards(name: str, cells: Sequence[examples.Cell], device: torch.device, dtype: torch.dtype) -> list[Any]:
    """What a transformer answers on one device, by cell."""
    model = _build(name, dtype).to(device, dtype)
    with exactly(model, dtype):
        return [tensors_of(model(**_inputs(name, cell, device, dtype), return_dict=False)) for cell in cells]


def exactly(model: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Inside, a model in fp32 does not round to half precision by itself."""
    return in_fp32() if rounds(model) and dtype == torch.float32 else nullcontext()


def _build(name: str, dtype: torch.dtype) -> nn.Module:
    example = examples.TINY[name].example
    init = dict(example.init) | (WIDER.get(name, {}) if dtype == torch.bfloat16 else {})
    return examples.Tiny(dataclasses.replace(example, init=init)).build()


def _inputs(name: str, cell: examples.Cell, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a forward; a timestep keeps its dtype."""

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() and value.ndim > 1 else value.to(device)

    found: dict[str, Any] = tree_map(moved, examples.inputs(name, *cell))
    return found


def _compare(part: Part, pool: RankPool, degrees: ParallelDegrees, name: str, dtype: torch.dtype) -> Sequence[object]:
    began = time.monotonic()
    cells = _cells(name)
    found = on_ranks(pool, degrees, part.device.type, compare, name, cells, dtype)
    by, kept = (max(values) for values in zip(*found, strict=True))
    if not by <= (BARS[dtype] if part.fake else max(BARS[dtype], OF_A_GPU)):
        raise ValueError(f"differs from one process by {by:.1e}")
    if dtype == torch.float32 and not kept > BLIND:
        raise ValueError(f"proves nothing: with attention kept local it differs by only {kept:.1e}")
    return len(cells), f"{by:.1e}", f"{kept:.1e}", time.monotonic() - began


@torch.no_grad()
def compare(mesh: ParallelMesh, name: str, cells: Sequence[examples.Cell], dtype: torch.dtype) -> tuple[float, float]:
    """On one rank: the largest difference from one process, and that with attention kept local."""
    examples.quiet_diffusers()
    model = _build(name, dtype).to(mesh.device, dtype)
    inputs = [_inputs(name, cell, mesh.device, dtype) | {"return_dict": False} for cell in cells]
    with exactly(model, dtype):
        plain = [tensors_of(model(**given)) for given in inputs]
        handle = parallelize(model, mesh)
        by = max(difference(tensors_of(model(**given)), p) for given, p in zip(inputs, plain, strict=True))
        with attention_kept_local():
            kept = max(difference(tensors_of(model(**given)), p) for given, p in zip(inputs, plain, strict=True))
        handle.remove()
    return by, kept
