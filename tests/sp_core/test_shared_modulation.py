"""The forwards of a guided step compute their modulation once, with the answer that they have alone."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sp_core.lora import Adapters, LowRank
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.shared_modulation import same_timestep
from sp_core.verify import examples
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.sp_core.test_replacements import LAYOUTS, compiled, one_rank, state_of, worst
from tests.support import qwen

MODULATED = {"qwen-image": 2 * 2, "z-image": 2 + 2 + 1}
"""Of each example, the layers that modulate: of both streams of its blocks; of its refiner, its layers, at its end."""


def branches(name: str) -> list[dict[str, Any]]:
    """A guided step: the inputs of two forwards whose texts differ."""
    inputs = examples.inputs(name, "uneven", "none", 1)
    text = "encoder_hidden_states" if name == "qwen-image" else "cap_feats"
    other = torch.zeros_like(inputs[text]) if name == "qwen-image" else [each * 0 for each in inputs[text]]
    return [inputs, inputs | {text: other}]


def guided(model: nn.Module, name: str, given: list[dict[str, Any]] | None = None) -> list[torch.Tensor]:
    with torch.no_grad(), same_timestep():
        return [model(**inputs, return_dict=False)[0][0] for inputs in given or branches(name)]


def plainly(model: nn.Module, name: str) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**inputs, return_dict=False)[0][0] for inputs in branches(name)]


def count_products(model: nn.Module) -> list[int]:
    """One more entry for each product of a modulation from now on."""
    calls: list[int] = []
    for layer in model.modules():
        if "shared" in vars(layer):
            last: Any = layer[-1] if isinstance(layer, nn.Sequential) else layer
            last.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", MODULATED)
def test_a_guided_step_modulates_once_with_the_same_answer(name: str) -> None:
    model = examples.TINY[name].build()
    before = plainly(model, name)
    parallelize(model, one_rank())
    calls = count_products(model)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(guided(model, name), before, strict=True))
        assert len(calls) == MODULATED[name]  # not twice as many
        calls.clear()
    assert all(torch.equal(a, b) for a, b in zip(plainly(model, name), before, strict=True))
    assert len(calls) == 2 * MODULATED[name]


@pytest.mark.parametrize("name", MODULATED)
def test_another_timestep_inside_a_step_would_be_seen(name: str) -> None:
    model = examples.TINY[name].build()
    first, second = branches(name)
    time = "timestep" if name == "qwen-image" else "t"
    wrong = [first | {time: first[time] * 0.1}, second]
    expected = plainly(model, name)[1]
    parallelize(model, one_rank())
    assert error(guided(model, name, wrong)[1], expected) > 100 * BAR


def test_two_embeddings_in_one_forward_are_not_mixed_up() -> None:
    """Z-Image with clean and noisy tokens embeds both timesteps; all layers then compute."""
    model: Any = examples.TINY["z-image"].build()
    parallelize(model, one_rank())
    embed = model.t_embedder
    layer = model.layers[0].adaLN_modulation
    with torch.no_grad(), same_timestep():
        noisy, clean = embed(torch.tensor([500.0])), embed(torch.tensor([1000.0]))
        assert not torch.equal(layer(noisy), layer(clean))


def test_a_failed_forward_leaves_no_values() -> None:
    model = qwen.transformer()
    parallelize(model, one_rank())
    with same_timestep(), pytest.raises(TypeError):
        model(**qwen.inputs(3, 3, 5) | {"img_shapes": 7})
    found = [vars(layer)["shared"] for layer in model.modules() if "shared" in vars(layer)]
    assert found == [None] * 4


@pytest.mark.parametrize("name", MODULATED)
def test_compiled_steps_share_without_more_graphs(name: str) -> None:
    model = examples.TINY[name].build()
    before = plainly(model, name)
    parallelize(model, one_rank())
    counters.clear()
    compiled(model)
    for _ in range(3):
        assert worst(guided(model, name), before) <= BAR
    shared = counters["stats"]["unique_graphs"]
    counters.clear()
    plainly(compiled(examples.TINY[name].build()), name)
    assert shared == counters["stats"]["unique_graphs"] > 0


def test_adapters_on_modulation_are_shared_too() -> None:
    model, plain = qwen.transformer(), qwen.transformer()
    parallelize(model, one_rank())
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"transformer_blocks.{i}.{stream}_mod.1": LowRank(
            torch.randn(2, 192, generator=generator), torch.randn(6 * 192, 2, generator=generator) * 0.05
        )
        for i in range(2)
        for stream in ("img", "txt")
    }
    inputs = [qwen.inputs(3, 3, 5), qwen.inputs(3, 3, 5, seed=2)]
    with torch.no_grad():
        without = plain(**inputs[0])[0]
        adapters = [Adapters(each) for each in (plain, model)]
        for each in adapters:
            each.load("ink", weights)
            each.activate({"ink": 1.0})
        expected = [plain(**each)[0] for each in inputs]
        assert error(without, expected[0]) > 100 * BAR
        with same_timestep():
            assert all(torch.equal(model(**each)[0], e) for each, e in zip(inputs, expected, strict=True))
        adapters[1].activate({})
        with same_timestep():
            assert torch.equal(model(**inputs[0])[0], without)


def guided_on_ranks(mesh: ParallelMesh, name: str) -> tuple[float, bool]:
    """The difference to one process, eager and compiled, and whether all is undone."""
    model: Any = examples.TINY[name].build()
    reference, before = plainly(model, name), state_of(model)
    handle = parallelize(model, mesh)
    eager = worst(guided(model, name), reference)
    difference = worst(guided(compiled(model), name), reference)
    if mesh.degrees.tensor_parallel_size > 1:
        return max(eager, difference), True
    for block in model.modules():
        block._compiled_call_impl = None
    handle.remove()
    return max(eager, difference), state_of(model) == before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULATED)
def test_guided_steps_on_two_ranks_give_the_answer_of_one(ranks: RankPool, name: str, layout: str) -> None:
    for difference, undone in ranks.run(LAYOUTS[layout], guided_on_ranks, name):
        assert difference <= BAR
        assert undone
