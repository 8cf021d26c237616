"""Replacements give the model's own answer in every layout, and `remove()` takes them back."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from sp_core import fused_gelu, real_rotation, shared_modulation
from sp_core.degrees import ParallelDegrees
from sp_core.lora import Adapters, LowRank
from sp_core.mesh import ParallelMesh
from sp_core.models.family import FusedGelu, RealRotation
from sp_core.models.lookup import find_family
from sp_core.models.qwen_image import QWEN_IMAGE
from sp_core.parallelize import parallelize
from sp_core.verify import examples
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support import qwen

ROTATED = ["qwen-image", "qwen-image edit", "z-image"]
LAYOUTS = {
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
    "ring 2": ParallelDegrees(ring_degree=2),
    "tp 2": ParallelDegrees(tensor_parallel_size=2),
    "cfg 2": ParallelDegrees(cfg_parallel_size=2),
}


def one_rank() -> ParallelMesh:
    return ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)


def answers(model: nn.Module, name: str, lengths: tuple[str, ...] = ("uneven",)) -> list[torch.Tensor]:
    """One tensor for each length."""
    cells = [(length, "none", 1) for length in lengths]
    with torch.no_grad():
        return [each for cell in cells for each in model(**examples.inputs(name, *cell), return_dict=False)[0]]


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(error(a, b) for a, b in zip(found, expected, strict=True))


def compiled(model: Any, backend: Any = "eager") -> Any:
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    return model


def state_of(model: nn.Module) -> dict[str, object]:
    """What a replacement could leave behind: classes, attributes and hooks of all modules, and their processors."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        found[name] = (type(module), {k: v for k, v in vars(module).items() if not k.startswith("_")}, [
            len(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ])  # fmt: skip
    return found


class Operands:
    """A backend of torch.compile that runs the graph as it is and remembers the types of numbers in it."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            self.dtypes |= {each.dtype for each in (value if isinstance(value, tuple | list) else [value])
                            if isinstance(each, torch.Tensor)}  # fmt: skip
        return graph.forward

    @property
    def has_complex(self) -> bool:
        return any(dtype.is_complex for dtype in self.dtypes)


@pytest.mark.parametrize("name", ROTATED)
def test_eager_answers_are_the_same_to_the_bit(name: str) -> None:
    model = examples.TINY[name].build()
    before = answers(model, name)
    parallelize(model, one_rank())
    assert all(torch.equal(a, b) for a, b in zip(answers(model, name), before, strict=True))


@pytest.mark.parametrize("name", ROTATED)
def test_a_wrong_rotation_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = real_rotation.rotate

    def back(x: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return rotate(x, pairs * torch.tensor([1.0, -1.0]))

    model = examples.TINY[name].build()
    before = answers(model, name)
    parallelize(model, one_rank())
    compiled(model)
    monkeypatch.setattr(real_rotation, "rotate", back)
    assert worst(answers(model, name), before) > 100 * BAR


@pytest.mark.parametrize("name", ROTATED)
def test_compiled_blocks_have_no_complex_number_and_the_same_answer(name: str) -> None:
    plain, replaced = Operands(), Operands()
    before = answers(compiled(examples.TINY[name].build(), plain), name)
    model = examples.TINY[name].build()
    parallelize(model, one_rank())
    assert worst(answers(compiled(model, replaced), name), before) <= BAR
    assert plain.has_complex
    assert replaced.dtypes
    assert not replaced.has_complex


@pytest.mark.parametrize("name", ROTATED)
def test_remove_gives_back_every_part(name: str) -> None:
    model = examples.TINY[name].build()
    before, found = state_of(model), answers(model, name)
    kinds = {type(module) for module in model.modules()}
    methods = {kind: dict(vars(kind)) for kind in kinds}
    for _ in range(2):
        handle = parallelize(model, one_rank())
        assert state_of(model) != before
        handle.remove()
        assert state_of(model) == before
    assert {kind: dict(vars(kind)) for kind in kinds} == methods
    assert all(torch.equal(a, b) for a, b in zip(answers(model, name), found, strict=True))


class Subclass(QwenImageTransformer2DModel):  # type: ignore[misc]
    """Its forward could do anything with the rotations."""


def exchanged(model: Any) -> Any:
    processor = model.transformer_blocks[1].attn.processor
    model.transformer_blocks[1].attn.processor = type("Other", (type(processor),), {})()
    return model


@pytest.mark.parametrize("strange", ["subclass", "own plan", "exchanged processor", "no source"])
def test_a_model_that_is_not_as_expected_stays_as_it_is(strange: str) -> None:
    model: Any = qwen.transformer()
    if strange == "subclass":
        model.__class__ = Subclass
    if strange == "exchanged processor":
        exchanged(model)
    if strange == "no source":
        model.pos_embed = None
    before = state_of(model)
    parallelize(model, one_rank(), QWEN_IMAGE.sp_plan if strange == "own plan" else None)
    after = state_of(model)
    if strange in ("subclass", "own plan"):
        assert after == before
    rotating = [name for name in before if name == "pos_embed" or "attn" in name]
    assert len(rotating) > 2
    assert all(after[name] == before[name] for name in rotating)


def test_complex_rotations_from_elsewhere_are_taken_as_well() -> None:
    """A caller may replace the source after `parallelize`."""
    model = qwen.transformer()
    inputs = qwen.inputs(3, 3, 5)
    with torch.no_grad():
        before = model(**inputs)[0]
        own = copy.deepcopy(model.pos_embed)
        parallelize(model, one_rank())
        model.pos_embed = own
        assert torch.equal(model(**inputs)[0], before)
        assert error(compiled(model)(**inputs)[0], before) <= BAR


def on_ranks(mesh: ParallelMesh, name: str) -> tuple[float, bool, bool]:
    """The difference to one process, whether compiled blocks hold complex numbers, whether all is undone."""
    model: Any = examples.TINY[name].build()
    reference, operands, before = answers(model, name), Operands(), state_of(model)
    handle = parallelize(model, mesh)
    eager = worst(answers(model, name), reference)
    difference = worst(answers(compiled(model, operands), name), reference)
    if mesh.degrees.tensor_parallel_size == 1:
        for block in model.modules():
            block._compiled_call_impl = None
        handle.remove()
    undone = mesh.degrees.tensor_parallel_size > 1 or state_of(model) == before
    return max(eager, difference), operands.has_complex, undone


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROTATED)
def test_two_ranks_give_the_answer_of_one(ranks: RankPool, name: str, layout: str) -> None:
    for difference, has_complex, undone in ranks.run(LAYOUTS[layout], on_ranks, name):
        assert difference <= BAR
        assert not has_complex
        assert undone


def test_adapters_beside_replacements() -> None:
    """On every linear layer of the blocks."""
    inputs, generator = qwen.inputs(3, 3, 5), torch.Generator().manual_seed(0)
    plain, model = qwen.transformer(), qwen.transformer()
    weights = {
        name: LowRank(
            torch.randn(2, layer.in_features, generator=generator),
            torch.randn(layer.out_features, 2, generator=generator),
        )
        for name, layer in plain.transformer_blocks.named_modules(prefix="transformer_blocks")
        if isinstance(layer, nn.Linear)
    }
    parallelize(model, one_rank())
    with torch.no_grad():
        without = plain(**inputs)[0]
        for each in (plain, model):
            adapters = Adapters(each)
            adapters.load("ink", weights)
            adapters.activate({"ink": 0.05})
        expected = plain(**inputs)[0]
        assert error(without, expected) > 100 * BAR
        assert error(compiled(model)(**inputs)[0], expected) <= BAR


def test_a_family_declares_what_diffusers_has() -> None:
    """Where a release renames one of these, the replacement would silently step aside."""
    for name in ROTATED:
        model = examples.TINY[name].build()
        family = find_family([type(model).__name__])
        assert family is not None and family.replacements
        for each in family.replacements:
            if isinstance(each, RealRotation):
                assert real_rotation.replace(model, each) is not None
            elif isinstance(each, FusedGelu):
                assert fused_gelu.replace(model, each) is not None
            else:
                done = shared_modulation.replace(model, model.config, each, one_rank())
                assert (done is None) == (name == "qwen-image edit")
