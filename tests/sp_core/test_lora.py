"""Law 1 with adapters: under any layout the answer is that of diffusers and PEFT on one process."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sp_core import collectives, lora
from sp_core.degrees import ParallelDegrees
from sp_core.lora import Adapters, LowRank
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.tensor_parallel import RowParallelLinear
from sp_core.verify import examples
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.sp_core.test_families import worst
from tests.support.lora_files import PIPELINES, by_peft, forward, kind_of, pair, write, write_with_config
from workers.model.lora import read_lora
from workers.model.weights import load_transformer

WITHOUT_TP = ("hunyuan-video", "sd3")
"""Families that have no tensor-parallel plan."""
LAYOUTS = {
    "tp 2": ParallelDegrees(tensor_parallel_size=2),
    "tp 4": ParallelDegrees(tensor_parallel_size=4),
    "tp 2 x ulysses 2": ParallelDegrees(tensor_parallel_size=2, ulysses_degree=2),
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
    "ring 2": ParallelDegrees(ring_degree=2),
}
STATES: dict[str, dict[str, float]] = {
    "off": {},
    "wide": {"wide": 0.7},
    "both": {"wide": 0.5, "narrow": -1.25},
    "narrow": {"narrow": 1.0},
}


Proof = Callable[[str], Path]


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    """For a family the file of its two adapters, as we read them, and of PEFT's answers."""

    @functools.cache
    def prove(name: str) -> Path:
        folder = tmp_path_factory.mktemp("lora")
        files = {
            "wide": write_with_config(folder / "wide.safetensors", name),
            "narrow": write(folder / "narrow.safetensors", name, every=3),
        }
        read = {adapter: read_lora(path, kind_of(name))["transformer"] for adapter, path in files.items()}
        plain = {adapter: {module: tuple(each) for module, each in of.items()} for adapter, of in read.items()}
        torch.save((plain, by_peft(name, files, STATES)), folder / "proof.pt")
        return folder / "proof.pt"

    return prove


def loaded(model: nn.Module, adapters: dict[str, dict[str, Any]]) -> Adapters:
    found = Adapters(model)
    for name, weights in adapters.items():
        found.load(name, {module: LowRank(*each) for module, each in weights.items()})
    return found


def in_states(model: nn.Module, name: str, proven: Path) -> dict[str, float]:
    """How far each state is from PEFT's; "off" is infinite unless it is the plain model's answer to the bit."""
    adapters, references = torch.load(proven)
    before, names, reductions = forward(model, name), list(model.state_dict()), []
    switch = loaded(model, adapters)
    summed, found = collectives.all_reduce, {}
    for state in ("wide", "off", "both", "narrow", "off"):
        switch.activate(STATES[state])
        with mock.patch.object(collectives, "all_reduce", side_effect=summed) as counted:
            outputs = forward(model, name)
        reductions.append(counted.call_count)
        assert list(model.state_dict()) == names
        found[state] = worst(outputs, references[state])
        if state == "off" and not all(torch.equal(a, b) for a, b in zip(outputs, before, strict=True)):
            found[state] = float("inf")
    assert len(set(reductions)) == 1, "adapters cost a collective"
    return found


def differences(mesh: ParallelMesh, name: str, proven: Path) -> dict[str, float]:
    model = copy.deepcopy(examples.TINY[name].model)
    parallelize(model, mesh)
    return in_states(model, name, proven)


def suits(name: str, layout: str) -> bool:
    if name == "z-image" and layout == "tp 4":
        return False  # it has 6 heads
    return not (name in WITHOUT_TP and LAYOUTS[layout].tensor_parallel_size > 1)


@pytest.mark.parametrize("name", PIPELINES)
def test_one_process_is_peft(proof: Proof, name: str) -> None:
    found = in_states(copy.deepcopy(examples.TINY[name].model), name, proof(name))
    assert {state: by for state, by in found.items() if not by <= BAR} == {}
    references = torch.load(proof(name))[1]
    answers = [references[state] for state in STATES]
    assert min(worst(a, b) for i, a in enumerate(answers) for b in answers[:i]) > 100 * BAR


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name in PIPELINES for layout in LAYOUTS if suits(name, layout)]
)
def test_any_layout_is_peft_on_one_process(ranks: RankPool, proof: Proof, name: str, layout: str) -> None:
    for found in ranks.run(LAYOUTS[layout], differences, name, proof(name)):
        assert {state: by for state, by in found.items() if not by <= BAR} == {}


def added_late(layer: Any, input: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = layer.add(RowParallelLinear.forward(layer, input), input)
    return output


def broken(mesh: ParallelMesh, name: str, proven: Path, how: str) -> float:
    model: Any = copy.deepcopy(examples.TINY[name].model)
    parallelize(model, mesh)
    adapters, references = torch.load(proven)
    if how == "other rows of B":
        for layer in (m for m in model.modules() if hasattr(m, "index")):
            layer.index = layer.index.flip(0)
    switch = loaded(model, adapters)
    switch.activate(STATES["wide"])
    if how == "added after the sum":
        with (
            mock.patch.object(lora._AdaptedRows, "partial", RowParallelLinear.partial),
            mock.patch.object(lora._AdaptedRows, "forward", added_late),
        ):
            return worst(forward(model, name), references["wide"])
    return worst(forward(model, name), references["wide"])


@pytest.mark.parametrize("how", ["added after the sum", "other rows of B"])
@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in WITHOUT_TP])
def test_wrong_parts_would_be_seen(ranks: RankPool, proof: Proof, name: str, how: str) -> None:
    assert min(ranks.run(LAYOUTS["tp 2"], broken, name, proof(name), how)) > 100 * BAR


def filled(mesh: ParallelMesh, folder: Path, name: str, proven: Path) -> dict[str, float]:
    return in_states(load_transformer(folder, mesh, torch.float32), name, proven)


@pytest.mark.parametrize("name", ["qwen-image", "flux-2"])
def test_models_of_which_each_rank_has_read_its_share(ranks: RankPool, proof: Proof, tmp_path: Path, name: str) -> None:
    examples.TINY[name].model.save_pretrained(tmp_path)  # type: ignore[operator]
    for found in ranks.run(LAYOUTS["tp 2"], filled, tmp_path, name, proof(name)):
        assert max(found.values()) <= BAR


def compiled(mesh: ParallelMesh, name: str, proven: Path) -> tuple[dict[str, float], list[int]]:
    """The differences, and the number of graphs after each of three rounds through all states."""
    torch._dynamo.reset()
    counters.clear()
    model: Any = copy.deepcopy(examples.TINY[name].model)
    parallelize(model, mesh)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    adapters, references = torch.load(proven)
    switch = loaded(model, adapters)
    found, graphs = {}, []
    for times in (1.0, 1.0, -0.5):
        for state, scales in STATES.items():
            switch.activate({adapter: scale * times for adapter, scale in scales.items()})
            outputs = forward(model, name)
            if times == 1:
                found[state] = worst(outputs, references[state])
        graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs


@pytest.mark.soak  # `tests/workers/test_warm_up.py` compiles blocks with an adapter, too
def test_compiled_blocks_switch(ranks: RankPool, proof: Proof) -> None:
    for found, graphs in ranks.run(LAYOUTS["tp 2"], compiled, "wan", proof("wan")):
        assert max(found.values()) <= BAR
        assert graphs[0] > 1
        assert graphs[1] == graphs[2], "a state that was there before, or another scale, made a new graph"


def test_half_precision() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.Linear(64, 32, dtype=torch.bfloat16)
    layer = nn.Sequential(inner)
    a, b = pair(inner, 4, seed=1)
    x = examples.randn(2, 5, 64).to(torch.bfloat16)
    switch = Adapters(layer)
    switch.load("a", {"0": LowRank(a, b, 0.37)})
    switch.activate({"a": 1.3})
    with torch.no_grad():
        output, before = layer(x), nn.functional.linear(x.float(), inner.weight.float(), inner.bias.float())
    assert output.dtype == torch.bfloat16
    assert worst([output], [before + 1.3 * 0.37 * x.float() @ a.T @ b.T]) < 2**-6


def test_adapters_come_and_go() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    switch, weights = Adapters(model), {"0": LowRank(torch.ones(1, 6), torch.ones(4, 1))}
    plain = model(torch.ones(1, 6))
    for name in "ab":
        switch.load(name, weights)
    switch.activate({"a": 1, "b": 2})
    assert torch.allclose(model(torch.ones(1, 6)), plain + 18)
    switch.unload("b")
    assert (switch.names, switch.active) == (["a"], {"a": 1.0})
    assert torch.allclose(model(torch.ones(1, 6)), plain + 6)
    switch.activate({"a": -0.5})
    assert torch.allclose(model(torch.ones(1, 6)), plain - 3)
    switch.activate({"a": 0})
    assert switch.active == {} and type(model[0]) is nn.Linear


def test_an_activation_that_fails_half_way_leaves_nothing_behind() -> None:
    """A request without memory for its adapters is followed by one without adapters."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(1, 4)
    plain, switch, set_terms = model(x), Adapters(model), lora._set_terms
    weights = LowRank(torch.ones(1, 4), torch.ones(4, 1))

    def no_room(layer: nn.Module, terms: Any) -> None:
        if layer is model[1] and terms:
            raise MemoryError("no room")
        set_terms(layer, terms)

    for following in (lambda: switch.activate({}), lambda: switch.replace({})):
        switch.load("a", {"0": weights, "1": weights})
        with mock.patch.object(lora, "_set_terms", no_room), pytest.raises(MemoryError):
            switch.activate({"a": 1})
        assert not torch.equal(model(x), plain)
        following()
        assert torch.equal(model(x), plain)
        switch.replace({})


def test_what_does_not_fit_a_model() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4, device="meta"))
    switch, good = Adapters(model), LowRank(torch.ones(2, 6), torch.ones(4, 2))
    tries: dict[str, dict[str, LowRank]] = {
        "has weights for '7', which Sequential does not have; is it for another model?": {"0": good, "7": good},
        "'1', which is a Conv1d; only nn.Linear takes adapters": {"1": good},
        "'2', which has no weights yet": {"2": good},
        r"has A \(2, 5\) and B \(4, 2\) for '0', expected \(rank, 6\) and \(4, rank\)": {
            "0": LowRank(torch.ones(2, 5), good.b)
        },
        r"has A \(2, 6\) and B \(4, 3\)": {"0": LowRank(good.a, torch.ones(4, 3))},
        r"has A \(2, 6\) and B \(6, 2\)": {"0": LowRank(good.a, torch.ones(6, 2))},
        "has no weights": {},
    }
    for said, weights in tries.items():
        with pytest.raises(ValueError, match=said):
            switch.load("a", weights)
    assert switch.names == []
    switch.load("a", {"0": good})
    with pytest.raises(ValueError, match="'a' is loaded already; unload it first"):
        switch.load("a", {"0": good})
    with pytest.raises(ValueError, match="no adapter named 'b' is loaded; loaded: 'a'"):
        switch.activate({"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="the scale of adapter 'a' is nan, expected a finite number"):
        switch.activate({"a": float("nan")})
    assert switch.active == {}
