"""Ranks, and the forwards of a guided step, share their modulation, with the answer that each has alone."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch._dynamo.utils import counters

from sp_core import collectives, shared_modulation
from sp_core.degrees import ParallelDegrees
from sp_core.lora import Adapters, LowRank
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.shared_modulation import same_timestep
from sp_core.tensor_parallel import ColumnParallelLinear
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
            last.register_forward_hook(lambda it, _, made: None if made is vars(it).get("shared") else calls.append(1))
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


IN_THE_SHORT_RUN = {"ulysses 2": "z-image", "tp 2": "z-image", "ring 2": "qwen-image", "cfg 2": "qwen-image"}
"""Each layout on one of the two."""


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=() if IN_THE_SHORT_RUN[layout] == name else pytest.mark.soak)
        for name in MODULATED
        for layout in LAYOUTS
    ],
)
def test_guided_steps_on_two_ranks_give_the_answer_of_one(ranks: RankPool, name: str, layout: str) -> None:
    for difference, undone in ranks.run(LAYOUTS[layout], guided_on_ranks, name):
        assert difference <= BAR
        assert undone


SHARED = ["qwen-image", "flux", "sd3"]
SHARING = {
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
    "ring 3": ParallelDegrees(ring_degree=3),
    "ulysses 2 x ring 2": ParallelDegrees(ulysses_degree=2, ring_degree=2),
    "tp 2 x ulysses 2": ParallelDegrees(tensor_parallel_size=2, ulysses_degree=2),
    "cfg 2 x ulysses 2": ParallelDegrees(cfg_parallel_size=2, ulysses_degree=2),
}


def layers_of(model: nn.Module) -> int:
    return sum("shared" in vars(layer) for layer in model.modules())


def forward(model: nn.Module, name: str) -> torch.Tensor:
    """For two samples at different timesteps, which have modulations of their own."""
    inputs = examples.inputs(name, "uneven", "none", 2)
    inputs["timestep"] = inputs["timestep"] * torch.tensor([1.0, 0.3])
    with torch.no_grad():
        output: torch.Tensor = model(**inputs, return_dict=False)[0]
    return output


@dataclass(frozen=True)
class Shared:
    """Of one rank: how far its answers are from one process's, and with values dealt to other layers; the layers that
    share, and how many of them it computed."""

    difference: float
    mixed_up: float
    layers: int
    computed: int


def share_on_ranks(mesh: ParallelMesh, name: str) -> Shared:
    model: Any = examples.TINY[name].build()
    reference = forward(model, name)
    parallelize(model, mesh)
    calls = count_products(model)
    eager, computed = forward(model, name), len(calls)
    with pytest.MonkeyPatch.context() as patch:
        gather = collectives.all_gather_equal
        patch.setattr(collectives, "all_gather_equal", lambda *args: gather(*args)[::-1])
        mixed_up = forward(model, name)
    return Shared(error(eager, reference), error(mixed_up, reference), layers_of(model), computed)


@pytest.mark.parametrize(
    ("name", "layout"), [(n, la) for n in SHARED for la in SHARING if n != "sd3" or "tp" not in la]
)
def test_each_rank_computes_its_share_of_the_layers(ranks: RankPool, name: str, layout: str) -> None:
    degrees = SHARING[layout]
    found = ranks.run(degrees, share_on_ranks, name)
    sharing = degrees.tensor_parallel_size * degrees.sequence_parallel_size
    for each in found:
        assert each.difference <= BAR
        assert each.mixed_up > 100 * BAR
        assert each.computed <= -(-each.layers // sharing) + (name == "flux")  # half as wide in its single blocks
    assert sum(each.computed for each in found) == found[0].layers * degrees.cfg_parallel_size > 0


def share_compiled(mesh: ParallelMesh, name: str) -> float:
    model: Any = examples.TINY[name].build()
    reference = forward(model, name)
    parallelize(model, mesh)
    return error(forward(compiled(model), name), reference)


def test_compiled_blocks_take_what_ranks_share(ranks: RankPool) -> None:
    """Linear layers; others are in the guided steps above."""
    assert max(ranks.run(SHARING["ulysses 2"], share_compiled, "flux")) <= BAR


def share_with_adapters(mesh: ParallelMesh, name: str) -> tuple[float, float, bool]:
    """The difference to one process with an adapter for each layer of modulation; what the adapter does; that without
    it, and without parallelism, the model is as before."""
    plain, model = (examples.TINY[name].build() for _ in range(2))
    before = state_of(model)
    handle = parallelize(model, mesh)
    generator = torch.Generator().manual_seed(0)
    weights = {
        n: LowRank(
            torch.randn(2, layer.in_features, generator=generator),
            torch.randn(layer.out_features, 2, generator=generator) * 0.05,
        )
        for n, layer in plain.named_modules()
        if isinstance(layer, nn.Linear) and ("_mod." in n or ".norm" in n)
    }
    without = forward(plain, name)
    adapters = [Adapters(each) for each in (plain, model)]
    for each in adapters:
        each.load("ink", weights)
        each.activate({"ink": 1.0})
    expected, found = forward(plain, name), forward(model, name)
    adapters[1].activate({})
    handle.remove()
    return error(found, expected), error(without, expected), state_of(model) == before


@pytest.mark.parametrize("name", SHARED)
def test_adapters_on_modulation_that_ranks_share(ranks: RankPool, name: str) -> None:
    for difference, effect, undone in ranks.run(SHARING["ulysses 2"], share_with_adapters, name):
        assert difference <= BAR
        assert effect > 100 * BAR
        assert undone


def share_offloaded(mesh: ParallelMesh, name: str, first: str) -> tuple[float, int]:
    """The difference to one process where weights come to the device only when their layer runs, and the layers that
    were given a value."""
    model: Any = examples.TINY[name].build()
    reference, given = forward(model, name), []
    for step in ("offload", "parallelize") if first == "offload" else ("parallelize", "offload"):
        if step == "parallelize":
            parallelize(model, mesh)
        else:
            cpu_offload(model, execution_device=torch.device("cpu"))
    last = model.transformer_blocks[-1]
    last.register_forward_hook(lambda *_: given.append(sum(vars(m).get("shared") is not None for m in model.modules())))
    return error(forward(model, name), reference), sum(given)


@pytest.mark.parametrize("first", ["offload", "parallelize"])
@pytest.mark.parametrize("name", ["qwen-image", "flux"])
def test_offloaded_layers_compute_by_themselves(ranks: RankPool, name: str, first: str) -> None:
    for difference, given in ranks.run(SHARING["ulysses 2"], share_offloaded, name, first):
        assert difference <= BAR
        assert given == 0


def axes_that_share(mesh: ParallelMesh) -> list[list[str]]:
    whole = nn.Linear(8, 8)
    part = ColumnParallelLinear(whole, torch.arange(4))
    return [list(shared_modulation._sharing(layers, mesh)) for layers in ([whole, whole], [whole, part])]


def test_tensor_ranks_do_not_share_what_they_have_parts_of(ranks: RankPool) -> None:
    for whole, with_part in ranks.run(SHARING["tp 2 x ulysses 2"], axes_that_share):
        assert whole == ["tp", "sequence"]
        assert with_part == ["sequence"]
