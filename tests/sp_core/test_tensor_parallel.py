"""Law 1 for shared weights: tensor parallelism, alone and with sequence parallelism, gives one process's answer."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from sp_core import collectives
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import MeshAxis, ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.tensor_parallel import AcrossHeadsRMSNorm, apply_tensor_parallel, part_of
from sp_core.tp_plan import Colwise, Rowwise, tp_plan_from_diffusers
from sp_core.verify import examples
from sp_core.verify.examples import Cell
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.sp_core.test_families import worst
from tests.support import qwen

LAYOUTS = {
    "tp 2": ParallelDegrees(tensor_parallel_size=2),
    "tp 4": ParallelDegrees(tensor_parallel_size=4),
    "tp 2 x ulysses 2": ParallelDegrees(tensor_parallel_size=2, ulysses_degree=2),
    "tp 2 x ring 2": ParallelDegrees(tensor_parallel_size=2, ring_degree=2),
}
NAMES = [
    "qwen-image", "qwen-image edit", "flux control", "flux-2", "ltx", "wan", "wan per token", "wan image", "wan vace",
    "z-image",
]  # fmt: skip
VARIANTS = ("qwen-image edit", "wan per token", "wan vace")
CELLS = [(length, mask, batch) for length in ("even", "uneven") for mask in ("none", "per row") for batch in (1, 2)]


def outputs(model: nn.Module, name: str, cells: list[Cell]) -> dict[Cell, list[torch.Tensor]]:
    with torch.no_grad():
        return {cell: list(model(**examples.inputs(name, *cell), return_dict=False)[0]) for cell in cells}


def differences(mesh: ParallelMesh, name: str, unsummed: bool = False) -> tuple[dict[Cell, float], float]:
    """For every cell how far the ranks' answer is from one process's, and the share of the weights on this rank."""
    cells = [cell for cell in CELLS if cell in examples.cells(name)]
    whole = examples.TINY[name].model
    references = outputs(whole, name, cells)
    model = copy.deepcopy(whole)
    handle = parallelize(model, mesh)
    reduce = (lambda tensor, axis: tensor) if unsummed else collectives.all_reduce
    with mock.patch.object(collectives, "all_reduce", reduce):
        found = outputs(model, name, cells)
    with pytest.raises(RuntimeError, match="holds only a part of its weights"):
        handle.remove()
    size, held = (sum(p.numel() for p in m.parameters()) for m in (whole, model))
    return {cell: worst(found[cell], references[cell]) for cell in cells}, held / size


def refuse_removal(mesh: ParallelMesh) -> list[bool]:
    """Whether the model still computes the same in parallel after its handle refused to make it plain, twice."""
    cells: list[Cell] = [("uneven", "none", 1)]
    model = copy.deepcopy(examples.TINY["qwen-image"].model)
    handle = parallelize(model, mesh)
    before = outputs(model, "qwen-image", cells)[cells[0]]
    same = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="holds only a part of its weights"):
            handle.remove()
        same += map(torch.equal, outputs(model, "qwen-image", cells)[cells[0]], before)
    return same


@pytest.mark.parametrize("layout", ["tp 2", "tp 2 x ulysses 2"])
def test_a_refused_removal_undoes_nothing(ranks: RankPool, layout: str) -> None:
    for same in ranks.run(LAYOUTS[layout], refuse_removal):
        assert same == [True] * 2


def suits(name: str, layout: str) -> bool:
    if name in VARIANTS:  # the same layers as their family's, with other inputs: one product proves these
        return layout == "tp 2 x ulysses 2"
    return not (name == "z-image" and layout == "tp 4")  # it has 6 heads


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name in NAMES for layout in LAYOUTS if suits(name, layout)]
)
def test_shared_weights_give_the_answer_of_one_process(ranks: RankPool, name: str, layout: str) -> None:
    for found, held in ranks.run(LAYOUTS[layout], differences, name):
        assert {cell: by for cell, by in found.items() if not by <= BAR} == {}
        assert held < (0.8 if LAYOUTS[layout].tensor_parallel_size == 2 else 0.65)


@pytest.mark.parametrize("name", NAMES)
def test_partial_sums_would_be_seen(ranks: RankPool, name: str) -> None:
    found = ranks.run(LAYOUTS["tp 2"], differences, name, True)
    assert min(by for of_rank, _ in found for by in of_rank.values()) > 100 * BAR


def compiled(mesh: ParallelMesh, name: str) -> float:
    torch._dynamo.reset()
    cells = [("even", "none", 1), ("uneven", "none", 1)]
    model = copy.deepcopy(examples.TINY[name].model)
    references = outputs(model, name, cells)
    parallelize(model, mesh)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    found = outputs(model, name, cells)
    return max(worst(found[cell], references[cell]) for cell in cells)


def test_blocks_compile(ranks: RankPool) -> None:
    degrees = ParallelDegrees(tensor_parallel_size=2, ulysses_degree=2)
    assert max(ranks.run(degrees, compiled, "wan image")) <= BAR


def refusals(mesh: ParallelMesh) -> list[str]:
    said = []
    model = copy.deepcopy(examples.TINY["hunyuan-video"].model)
    odd = qwen.transformer(heads=3)
    linear = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    tries: list[Any] = [
        lambda: parallelize(model, mesh),
        lambda: parallelize(odd, mesh),
        lambda: apply_tensor_parallel(linear, {"2": Colwise()}, mesh.axis("tp")),
        lambda: apply_tensor_parallel(linear, {"1": Colwise()}, mesh.axis("tp")),
        lambda: apply_tensor_parallel(linear, {"0": Colwise((1, 1))}, mesh.axis("tp")),
        lambda: apply_tensor_parallel(linear, {"0": Rowwise((1, 2))}, mesh.axis("tp")),
    ]
    for attempt in tries:
        with pytest.raises(ValueError) as refused:
            attempt()
        said.append(str(refused.value))
    assert linear[0].weight.shape == (6, 4)
    return said


def test_what_cannot_be_shared(ranks: RankPool) -> None:
    for said in ranks.run(LAYOUTS["tp 2"], refusals):
        assert "HunyuanVideoTransformer3DModel has no tensor-parallel plan" in said[0]
        assert "tensor_parallel_size=2 does not divide the model's 3 attention heads; allowed: 1, 3" in said[1]
        assert "names '2', which the model does not have" in said[2]
        assert "'1' is a ReLU; only nn.Linear can be shared" in said[3]
        assert "does not divide the 6 features of '0', which are 3 + 3" in said[4]
        assert "does not divide the 4 features of '0'" in said[5]


def test_parts_of_fused_features() -> None:
    axis = MeshAxis("tp", 1, 2, None, None)
    assert part_of("x", 12, (1, 2), axis).tolist() == [2, 3, 8, 9, 10, 11]
    assert part_of("x", 4, (), axis).tolist() == [2, 3]


@pytest.mark.parametrize("norm", [nn.RMSNorm(6, eps=1e-3), nn.RMSNorm(6)])
def test_a_norm_over_one_rank_is_the_norm(norm: nn.RMSNorm) -> None:
    with torch.no_grad():
        norm.weight.copy_(1 + examples.randn(6).abs())
        x = examples.randn(2, 5, 6)
        ours = AcrossHeadsRMSNorm(norm, torch.arange(6), MeshAxis("tp", 0, 1, None, None))
        assert worst([ours(x)], [norm(x)]) <= BAR


def test_plans_of_diffusers() -> None:
    with pytest.raises(ValueError, match="expected 'colwise', 'rowwise' or a packed style"):
        tp_plan_from_diffusers({"a": "diagonal"})
