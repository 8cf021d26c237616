"""Compiled blocks: one full graph each, no recompilation for new lengths, the same answer."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sp_core.attention.layer import SequenceParallelAttention
from sp_core.compiled_blocks import compile_blocks
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.region import SequenceContext
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput
from sp_core.verify import examples
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support import qwen
from tests.support.programs import needs_compiler

OPERATORS = ("attention", "linear_attention", "convolution", "grid", "shard", "gather", "all_reduce")

PROMPTS = [5, 9, *range(10, 30)]
"""Prompt lengths: two to warm up (with a second length, torch makes it a symbol), and 20 that nobody has seen."""


def compiled_blocks(mesh: ParallelMesh, masked: bool, first: str) -> tuple[float, list[int]]:
    """The worst difference to the plain model, and the number of graphs after each prompt."""
    torch._dynamo.reset()
    counters.clear()
    plain, model = qwen.transformer(), qwen.transformer()
    for step in ("parallelize", "compile") if first == "parallelize" else ("compile", "parallelize"):
        if step == "parallelize":
            parallelize(model, mesh)
        else:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    worst, graphs = 0.0, []
    with torch.no_grad():
        for text in PROMPTS:
            inputs = qwen.inputs(4, 3, text, mask=[[True] * (text - 2) + [False] * 2] if masked else None)
            reference = plain(**inputs, return_dict=False)[0]
            worst = max(worst, error(model(**inputs, return_dict=False)[0], reference))
            graphs.append(counters["stats"]["unique_graphs"])
    return worst, graphs


@pytest.mark.parametrize(
    ("degrees", "masked", "first"),
    [
        (ParallelDegrees(ulysses_degree=2), True, "parallelize"),
        (ParallelDegrees(ring_degree=2), False, "compile"),
        pytest.param(ParallelDegrees(ulysses_degree=2), False, "compile", marks=pytest.mark.soak),
        pytest.param(ParallelDegrees(ring_degree=2), True, "parallelize", marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_twenty_new_prompt_lengths_need_no_new_graph(
    ranks: RankPool, degrees: ParallelDegrees, masked: bool, first: str
) -> None:
    for worst, graphs in ranks.run(degrees, compiled_blocks, masked, first):
        assert worst <= BAR
        assert graphs[0] > 0
        assert graphs[1:] == [graphs[1]] * (len(PROMPTS) - 1)


def check_operators(mesh: ParallelMesh) -> list[str]:
    """torch's own check: shapes that are traced are those that come, and nothing is aliased or changed."""
    context = SequenceContext(mesh)
    context.begin()
    x = torch.rand(1, 7, 3, 4)
    axis = mesh.axis("sequence")
    split = (x.flatten(2), 1, context.number, "x", False, 0, axis.rank, axis.size)
    context.running().region.split(x.flatten(2), 1, "x")  # type: ignore[union-attr]
    context.running().region.grid["rows"] = 7  # type: ignore[union-attr]
    own = x[:, : 4 - axis.rank].clone()
    line = own[..., 0].transpose(1, 2).unsqueeze(2).contiguous()
    weight, bias = torch.rand(5, 3, 3, 1), torch.rand(5)
    convolve = (line, weight, bias, "c", "rows", context.number, context.noted)
    attend = (own, own * 2, own, None, None, context.number, "", "", 0, 0.0)
    add = (x.clone(), axis.number)
    outcomes = [
        outcome
        for operator, arguments in (
            (torch.ops.sp_core.shard, split),
            (torch.ops.sp_core.attention, attend),
            (torch.ops.sp_core.linear_attention, (own, own, own, None, None, context.number, "")),
            (torch.ops.sp_core.grid, (context.noted, "rows", 7, context.number)),
            (torch.ops.sp_core.convolution, convolve),
            (torch.ops.sp_core.all_reduce, add),
        )
        for outcome in torch.library.opcheck(
            operator.default, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
        ).values()
    ]
    context.end()  # the ranks of the pool go on to other tests
    return outcomes


def test_operators_are_what_is_traced(ranks: RankPool) -> None:
    assert ranks.run(ParallelDegrees(ulysses_degree=2), check_operators) == [["SUCCESS"] * 3 * (len(OPERATORS) - 1)] * 2


def test_no_operator_of_ours_is_recorded_in_a_cuda_graph() -> None:
    """Each looks up the running forward, and may exchange with other ranks: neither happens when a graph replays."""
    tagged = {name: torch.Tag.cudagraph_unsafe in getattr(torch.ops.sp_core, name).default.tags for name in OPERATORS}
    assert tagged == dict.fromkeys(OPERATORS, True)


def inductor(mesh: ParallelMesh) -> float:
    """Ranks share a cache of compiled graphs on disk; none may be handed a graph with another rank's shares."""
    torch._dynamo.reset()
    plain, model = qwen.transformer(layers=1), qwen.transformer(layers=1)
    parallelize(model, mesh)
    model.compile_repeated_blocks(fullgraph=True)
    with torch.no_grad():
        inputs = qwen.inputs(3, 3, 7, mask=[[True] * 5 + [False] * 2])
        reference = plain(**inputs, return_dict=False)[0]
        return error(model(**inputs, return_dict=False)[0], reference)


@needs_compiler
@pytest.mark.processes
@pytest.mark.soak  # of smaller blocks `tests/workers/test_compiler.py` proves it
def test_compiled_to_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RankPool(2)  # new processes, with a cache of their own
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    try:
        assert max(pool.run(ParallelDegrees(ulysses_degree=2), inductor)) <= BAR
    finally:
        pool.stop()


def compiled_family(mesh: ParallelMesh, name: str) -> float:
    torch._dynamo.reset()
    model = copy.deepcopy(examples.TINY[name].model)
    worst = 0.0
    with torch.no_grad():
        inputs = [examples.inputs(name, *cell) for cell in examples.cells(name) if cell[2] == 1][:3]
        references = [model(**each, return_dict=False)[0] for each in inputs]
        parallelize(model, mesh)
        compile_blocks(model, backend="aot_eager")
        for each, reference in zip(inputs, references, strict=True):
            output = model(**each, return_dict=False)[0]
            worst = max(worst, *(error(a, b) for a, b in zip(list(output), list(reference), strict=True)))
    return worst


LATER = (
    "wan per token",
    "sana",
    "flux-2",
    "flux control",
    "hunyuan-video",
    "ltx",
    "latte",
    "lumina-next proportional",
    "mochi",
    "sd3.5",
    "z-image",
)


@pytest.mark.parametrize(
    "name",
    [
        "sana-video per token",
        *(pytest.param(name, marks=pytest.mark.soak) for name in LATER),
    ],
)
def test_blocks_of_other_families_compile(ranks: RankPool, name: str) -> None:
    assert max(ranks.run(ParallelDegrees(ulysses_degree=2), compiled_family, name)) <= BAR


def graphs_of_grids(mesh: ParallelMesh) -> list[int]:
    torch._dynamo.reset()
    counters.clear()
    model, graphs = copy.deepcopy(examples.TINY["sana"].model), []
    parallelize(model, mesh)
    compile_blocks(model, backend="aot_eager")
    with torch.no_grad():
        for height, width, text in ((3, 4, 5), (4, 6, 6), (5, 8, 7), (6, 5, 8)):
            model(torch.ones(1, 4, height, width), torch.ones(1, text, 16), torch.ones(1))
            graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def with_cuda_graphs(mesh: ParallelMesh) -> float:
    """With the option for graphs of CUDA; on CPU none are made."""
    torch._dynamo.reset()
    model = copy.deepcopy(examples.TINY["sana"].model)
    inputs = examples.inputs("sana", "uneven", "none", 1)
    with torch.no_grad():
        reference = model(**inputs, return_dict=False)[0]
        parallelize(model, mesh)
        compile_blocks(model, options={"triton.cudagraphs": True})
        return error(model(**inputs, return_dict=False)[0], reference)


@needs_compiler
@pytest.mark.soak
def test_convolutions_compile_with_the_option_for_cuda_graphs(ranks: RankPool) -> None:
    assert max(ranks.run(ParallelDegrees(ulysses_degree=2), with_cuda_graphs)) <= BAR


@pytest.mark.soak
def test_new_sizes_of_a_grid_need_no_new_graph(ranks: RankPool) -> None:
    for graphs in ranks.run(ParallelDegrees(ulysses_degree=2), graphs_of_grids):
        assert graphs[0] > 0
        assert graphs[1:] == [graphs[1]] * 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SequenceParallelAttention()

    def forward(self, x: torch.Tensor, joint: torch.Tensor) -> torch.Tensor:
        heads, extra = x.unflatten(2, (2, 4)), joint.unflatten(2, (2, 4))
        joined = self.attention(heads, heads, heads, joint_query=extra, joint_key=extra, joint_value=extra)
        return x + joined[:, joint.shape[1] :].flatten(2)


class Own(nn.Module):
    _sp_plan: ClassVar[dict[str, object]] = {
        "blocks.0": {"x": SequenceParallelInput(1)},
        "blocks.-1": SequenceParallelOutput(1),
    }

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor, joint: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, joint)
        return x


def compiled_layer(mesh: ParallelMesh) -> float:
    torch._dynamo.reset()
    model, joint = Own(), torch.ones(1, 3, 8)
    worst = 0.0
    tokens = [torch.randn(1, n, 8, generator=torch.Generator().manual_seed(n)) for n in (9, 12, 17)]
    references = [model(x, joint) for x in tokens]
    parallelize(model, mesh)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for x, reference in zip(tokens, references, strict=True):
            worst = max(worst, error(model(x, joint), reference))
    return worst


def test_blocks_with_our_layer_compile(ranks: RankPool) -> None:
    assert max(ranks.run(ParallelDegrees(ulysses_degree=2), compiled_layer)) <= BAR


@pytest.mark.parametrize("given", [{}, {"options": {"triton.cudagraphs": True}}, {"backend": "aot_eager"}], ids=str)
def test_inductor_leaves_collectives_in_the_order_of_the_model(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda block, **options: told.append(options))
    compile_blocks(copy.deepcopy(examples.TINY["sana"].model), **given)
    assert told
    for options in told:
        assert {**options.get("options", {}), **given.get("options", {})} == options.get("options", {})
        assert options.get("backend") or options["options"]["reorder_for_peak_memory"] is False
