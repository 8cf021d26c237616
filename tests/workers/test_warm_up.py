"""After the warm-up of a compiled model, no request of a warm shape compiles anything, whatever its prompt.

Nor does a second start on the node: it finds what the first one compiled.
"""

import functools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from deploy.model_sections import LoRA, WarmupShape
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankPool
from tests.support.deployments import model
from tests.support.programs import needs_compiler
from workers.gang.rank import Rank
from workers.messages import Drawn, GenerationRequest
from workers.model.loader import load_model
from workers.model.torch_internals import VARIABLE, graphs

pytestmark = pytest.mark.processes

ULYSSES = ParallelDegrees(ulysses_degree=2)

FIRST = GenerationRequest("a", "demo", "a cup of coffee on a table", width=64, height=48, num_inference_steps=2, seed=1)
REQUESTS = [
    FIRST,
    replace(FIRST, prompt="x", negative_prompt="a long list of things that nobody wants to see"),
    replace(FIRST, prompt="both branches are one batch", negative_prompt="if their length is the same"),
    replace(FIRST, prompt="a much longer prompt than any before, with many words in it", negative_prompt=""),
    replace(FIRST, prompt="a prompt of yet another length", loras=(("ink", 0.5),)),
]


def start(mesh: ParallelMesh, folder: Path, ink: LoRA, kept: Path) -> tuple[list[int], tuple[int, int]]:
    """How many graphs there are after the start, after an adapter has come, and after each request.

    And how many of them were found on the disk, and how many were compiled.
    """
    compiled = {"compile": True, "warmup_shapes": (WarmupShape(width=64, height=48),)}
    spec = model(folder, ulysses_degree=mesh.degrees.ulysses_degree).model_copy(update=compiled)
    rank = Rank(mesh.axis("gang").rank, spec, compiled_folder=str(kept))
    rank._use(load_model(rank.model, mesh))
    with rank._compiler.warming("start"):
        rank._warm_up()
    found = [counters["stats"]["unique_graphs"]]
    rank.set_loras((ink,))
    found.append(counters["stats"]["unique_graphs"])
    for request in REQUESTS:
        assert any(isinstance(report, Drawn) for report in rank.generate(request)) == (rank.rank == 0)
        found.append(counters["stats"]["unique_graphs"])
        if request.negative_prompt:
            assert rank.status().guidance.startswith("two forwards: the prompts have")
    return found, graphs()


def traced(mesh: ParallelMesh, folder: Path, ink: LoRA, kept: Path) -> list[int]:
    """The same counts of graphs that are traced as those are, but run without machine code of their own."""
    torch._dynamo.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        patch.setitem(os.environ, VARIABLE, str(kept))  # the pool's ranks go on to other tests: none is to be kept
        found, _ = start(mesh, folder, ink, kept)
    torch._dynamo.reset()
    return found


def check_graphs(found: list[int]) -> None:
    """Some come with the start, some with the adapter, none with a request."""
    assert found[0] > 0
    assert found[1] > found[0]
    assert found[2:] == [found[1]] * len(REQUESTS)


def test_no_request_compiles(ranks: RankPool, demo_model: Path, ink: LoRA, tmp_path: Path) -> None:
    for found in ranks.run(ULYSSES, traced, demo_model, ink, tmp_path):
        check_graphs(found)


@needs_compiler
@pytest.mark.soak  # of smaller blocks `test_compiler.py` proves it
def test_a_second_start_finds_all_graphs(demo_model: Path, ink: LoRA, tmp_path: Path) -> None:
    for time in ("first", "second"):
        pool = RankPool(2)  # new processes
        try:
            for found, (cached, compiled) in pool.run(ULYSSES, start, demo_model, ink, tmp_path):
                check_graphs(found)
                assert (compiled > 0) == (time == "first")
                assert cached + compiled == found[1]
        finally:
            pool.stop()
