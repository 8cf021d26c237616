"""Law 1 on diffusers' transformers of every family: all layouts x the cells of `sp_core.verify.examples`."""

import fnmatch
import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch

from sp_core.attention.region_attention import attention_kept_local
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.models.lookup import families, find_family, planned_families
from sp_core.parallelize import parallelize
from sp_core.sp_plan import plan_from_diffusers
from sp_core.tp_plan import tp_plan_from_diffusers
from sp_core.verify import examples
from sp_core.verify.alone import in_fp32, rounds
from sp_core.verify.divergence import error
from sp_core.verify.examples import Cell
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.sp_core.test_same_answer import LAYOUTS
from tests.support import qwen


def forward(name: str, cell: Cell) -> list[torch.Tensor]:
    """The model's output, one tensor per sample."""
    model = examples.TINY[name].model
    with torch.no_grad(), in_fp32() if rounds(model) else nullcontext():
        return list(model(**examples.inputs(name, *cell), return_dict=False)[0])


@functools.cache
def reference(name: str, cell: Cell) -> list[torch.Tensor]:
    """One process's output; the model is plain when this is asked for the first time."""
    return forward(name, cell)


def worst(outputs: list[torch.Tensor], references: list[torch.Tensor]) -> float:
    return max(error(output, reference) for output, reference in zip(outputs, references, strict=True))


def differences(mesh: ParallelMesh, name: str, local: bool = False) -> dict[Cell, float]:
    """For every cell of a family, how far the ranks' answer is from one process's."""
    references = {cell: reference(name, cell) for cell in examples.cells(name)}
    handle = parallelize(examples.TINY[name].model, mesh)
    with attention_kept_local() if local else nullcontext():
        found = {cell: worst(forward(name, cell), reference) for cell, reference in references.items()}
    handle.remove()
    return found


FOR_VARIANTS = ("ulysses 3", "ulysses 2 x ring 2")
"""A variant (two words: `wan image`) has its family's attention and other inputs; fewer layouts prove these. Rings of
three are those of `ON_EVERY_LAYOUT`."""

PLANNED = {name for family in planned_families() for name in family.examples}
"""They have the attention of families written by hand; most is left to the soak."""

IN_THE_SHORT_RUN = (
    "bria fibo", "pixart", "hunyuan-image", "cog-video-x", "lumina-2", "ernie-image", "prx", "hunyuan-video-15",
    "joy-image-edit", "bria-fibo-2", "cosmos", "any-flow", "motif-video image", "skyreels-v2 forcing",
    "sana-video per token",
    "lumina-next proportional",
    "mochi",
    "latte",
    "joy-image-edit-plus",
)  # fmt: skip
"""Of these on fewer layouts: one for each way in which a plan divides them."""

ON_EVERY_LAYOUT = ("qwen-image", "wan")
"""Of the other families written by hand, most layouts are left to the soak."""


def left_out(name: str, of: object, few: Sequence[object]) -> bool:
    if name in PLANNED and name not in IN_THE_SHORT_RUN:
        return True
    return name not in ON_EVERY_LAYOUT and of not in few


def each(few: Sequence[object], many: Sequence[object]) -> list[Any]:
    """An example with each layout, or number of ranks, that is tried on it."""
    return [
        pytest.param(name, of, marks=pytest.mark.soak if left_out(name, of, few) else ())
        for name in examples.TINY
        for of in (few if " " in name and name not in PLANNED else many)
    ]


@pytest.mark.parametrize(("name", "layout"), each(FOR_VARIANTS, list(LAYOUTS)))
def test_every_layout_gives_the_answer_of_one_process(ranks: RankPool, name: str, layout: str) -> None:
    for found in ranks.run(LAYOUTS[layout], differences, name):
        assert {cell: by for cell, by in found.items() if not by <= BAR} == {}


@pytest.mark.parametrize(("name", "world"), each([3], [2, 3, 4]))
def test_local_attention_would_be_seen(ranks: RankPool, name: str, world: int) -> None:
    found = ranks.run(ParallelDegrees(ulysses_degree=world), differences, name, True)
    worst_of = {cell: max(of_rank[cell] for of_rank in found) for cell in found[0]}
    assert {cell: by for cell, by in worst_of.items() if not by > 100 * BAR} == {}


def test_every_family_is_proved() -> None:
    proved = {type(tiny.model).__name__ for tiny in examples.TINY.values()}
    assert proved == {name for family in families() if not family.refused for name in family.transformer_classes}


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_a_tensor_plan_that_diffusers_has_too_says_the_same(name: str) -> None:
    kind, family = getattr(diffusers, name), find_family([name])
    assert family is not None
    config = next(example.init for example in family.examples.values())
    modules = [module for module, _ in kind(**config).named_modules()]
    ours, theirs = (
        {module: style for pattern, style in plan.items() for module in fnmatch.filter(modules, pattern)}
        for plan in (family.tensor_plan(config), tp_plan_from_diffusers(kind._tp_plan))
    )
    assert ours == theirs


def test_cells_that_do_not_apply_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    examples.main()
    table = capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{table}")
    for name in examples.TINY:
        assert name in table
        assert len(examples.cells(name)) >= 4


def two_in_turn(mesh: ParallelMesh) -> float:
    """Two transformers that take turns, at different lengths, as Wan 2.2's do."""
    first, second = examples.TINY["wan"].model, examples.TINY["wan"].build()
    long, short = (examples.inputs("wan", length, "none", 1) for length in ("even", "uneven"))
    turns = [(first, long), (second, short), (first, short), (second, long)]
    with torch.no_grad():
        references = [model(**inputs, return_dict=False)[0] for model, inputs in turns]
        handles = [parallelize(model, mesh) for model in (first, second)]
        outputs = [model(**inputs, return_dict=False)[0] for model, inputs in turns]
    for handle in handles:
        handle.remove()
    return worst(outputs, references)


def test_two_models_alternate(ranks: RankPool) -> None:
    assert max(ranks.run(ParallelDegrees(ulysses_degree=2), two_in_turn)) <= BAR


def by_diffusers_plan(mesh: ParallelMesh) -> tuple[float, str]:
    """Qwen-Image by the `_cp_plan` that diffusers ships, as any class without a family of ours."""
    model = qwen.transformer()
    model.__class__ = type("Stranger", type(model).__bases__, dict(vars(type(model))))
    inputs = qwen.inputs(height=5, width=3, text=7)
    with torch.no_grad():
        reference = model(**inputs, return_dict=False)[0]
        parallelize(model, mesh)
        output = model(**inputs, return_dict=False)[0]
        with pytest.raises(ValueError, match="does not say in which order") as refused:
            model(**qwen.inputs(height=5, width=3, text=1))
    return error(output, reference), str(refused.value)


def test_a_plan_of_diffusers_is_enough(ranks: RankPool) -> None:
    for difference, said in ranks.run(ParallelDegrees(ring_degree=2), by_diffusers_plan):
        assert difference <= BAR
        assert "pass plan= with the streams in that order" in said


def test_diffusers_plans_that_are_none() -> None:
    for plan in ({"a": {"x": 1}}, {"a": 1}, {"a": [1]}):
        with pytest.raises(ValueError, match="expected ContextParallel"):
            plan_from_diffusers(plan)
