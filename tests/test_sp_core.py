"""The parts of sp_core: plans, hooks, shares, mesh, the diffusers seam. The proof that they add up is elsewhere."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from torch import nn

from sp_core.degrees import ParallelDegrees
from sp_core.hooks import apply_sequence_parallel
from sp_core.mesh import ParallelMesh, axis_groups
from sp_core.parallelize import parallelize
from sp_core.sp_plan import (
    SequenceParallelInput,
    SequenceParallelOutput,
    get_sp_plan_from_model,
    resolve_modules,
    validate_sp_plan,
)
from sp_core.sp_sharding import Stream, sp_gather, sp_shard
from tests import qwen
from tests.ranks import RankPool

SPLIT = SequenceParallelInput(split_dim=1)
TWO = ParallelDegrees(ulysses_degree=2)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ([], "must be a dict"),
        ({1: SequenceParallelOutput(1)}, "keys must be strings"),
        ({"a": {1.5: SPLIT}}, "Input spec keys must be str or int"),
        ({"a": {True: SPLIT}}, "Input spec keys must be str or int"),
        ({"a": {0: SPLIT}}, "require split_output=True"),
        ({"a": {"x": SequenceParallelInput(1, split_output=True)}}, "use the output's index"),
        ({"a": {"x": 1}}, "Input spec values must be"),
        ({"a": 1}, r"_sp_plan values must be dict \(input spec\) or SequenceParallelOutput"),
        ({"a": []}, r"_sp_plan values must be dict \(input spec\) or SequenceParallelOutput"),
    ],
)
def test_malformed_plans(plan: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        validate_sp_plan(plan)


class Toy(nn.Module):
    """Sums over the sequence through its blocks; shards itself where told to."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ToyBlock(), ToyBlock()])
        self.outputs = nn.ModuleDict({"main": nn.Identity()})

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        for block in self.blocks:
            x = block(x, y)
        return self.outputs["main"](x)


class ToyBlock(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return x * 2 if y is None else x * 2 + y


class Intrusive(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        x = sp_shard(x, 1)
        return sp_gather(x + 1, 1), x.shape[1]


def test_names_of_modules() -> None:
    toy = Toy()
    assert resolve_modules(toy, "") == [toy]
    assert resolve_modules(toy, "blocks.1") == [toy.blocks[1]]
    assert resolve_modules(toy, "blocks.*") == list(toy.blocks)
    assert resolve_modules(toy, "outputs.main") == [toy.outputs["main"]]
    for name, says in (
        ("blocks.*.*", "can only be used once"),
        ("outputs.*", "can only be used with ModuleList"),
        ("blocks.7", "'7' .* is not a submodule of ModuleList in Toy; it has: 0, 1"),
        ("training", "is not a submodule"),
    ):
        with pytest.raises(ValueError, match=says):
            resolve_modules(toy, name)


def test_a_model_may_carry_its_plan() -> None:
    toy = Toy()
    assert get_sp_plan_from_model(toy) is None
    toy._sp_plan = {"blocks.0": {"x": SPLIT}}  # type: ignore[assignment]
    assert get_sp_plan_from_model(toy) == {"blocks.0": {"x": SPLIT}}


@pytest.mark.parametrize(
    ("length", "size", "padded", "shares", "real"),
    [
        (8, 4, False, [2, 2, 2, 2], [2, 2, 2, 2]),
        (9, 4, False, [3, 2, 2, 2], [3, 2, 2, 2]),
        (9, 4, True, [3, 3, 3, 3], [3, 3, 3, 0]),
        (2, 4, False, [1, 1, 1, 1], [1, 1, 0, 0]),
        (5, 1, False, [5], [5]),
    ],
)
def test_shares(length: int, size: int, padded: bool, shares: list[int], real: list[int]) -> None:
    stream = Stream(length, size, padded)
    assert (stream.shares, stream.real) == (shares, real)


def test_groups_of_a_mesh() -> None:
    degrees = ParallelDegrees(ulysses_degree=2, ring_degree=2, tensor_parallel_size=2, cfg_parallel_size=2)
    groups = axis_groups(degrees)
    assert groups["tp"][:2] == [[0, 1], [2, 3]]
    assert groups["ulysses"][:2] == [[0, 2], [1, 3]]
    assert groups["ring"][:2] == [[0, 4], [1, 5]]
    assert groups["cfg"][:2] == [[0, 8], [1, 9]]
    assert groups["sequence"] == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]


def test_a_mesh_needs_its_ranks() -> None:
    with pytest.raises(RuntimeError, match="needs 2 ranks: call torch"):
        ParallelMesh.create(TWO, device_type="cpu", timeout_s=60)
    alone = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    assert alone.axis("sequence").size == 1
    assert alone.agree(0, 1) == (0, 1)


def wrong_world(mesh: ParallelMesh) -> str:
    with pytest.raises(ValueError, match="is for 3 ranks, but the process group has 2") as refused:
        ParallelMesh.create(ParallelDegrees(ulysses_degree=3), device_type="cpu", timeout_s=60)
    return str(refused.value)


def test_a_mesh_of_another_size_is_refused(ranks: RankPool) -> None:
    assert all("product of the degrees" in said for said in ranks.run(TWO, wrong_world))


def agree(mesh: ParallelMesh) -> tuple[int, ...]:
    rank = mesh.axis("ulysses").rank
    return mesh.agree(rank, 5 - rank, 0)


def test_one_decision(ranks: RankPool) -> None:
    assert ranks.run(ParallelDegrees(ulysses_degree=3), agree) == [(2, 5, 0)] * 3


PLANS: list[dict[str, Any]] = [
    {"blocks.0": {"x": SPLIT}, "blocks.*": {"y": SPLIT}, "outputs.main": SequenceParallelOutput(1)},
    {"": {"x": SPLIT, "y": SPLIT}, "outputs.main": SequenceParallelOutput(1)},
    {
        "blocks.0": {0: SequenceParallelInput(1, split_output=True)},
        "blocks.1": {"y": SPLIT},
        "outputs.main": SequenceParallelOutput(1),
    },
]


def run_toy(mesh: ParallelMesh, plan: dict[str, Any], length: int, with_y: bool, by_name: bool) -> Any:
    toy = Toy()
    _, handle = apply_sequence_parallel(toy, plan, mesh)
    x = torch.arange(2.0 * length * 3).view(2, length, 3)
    y = torch.ones_like(x) if with_y else None
    output = toy(x=x, y=y) if by_name else toy(x, y)
    handle.remove()
    return output, toy(x, y), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in toy.modules()]


@pytest.mark.parametrize("length", [4, 5, 1])
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=["at the first block", "at the root", "behind the first block"])
def test_hooks_split_and_gather_and_go(ranks: RankPool, plan: Any, length: int, by_name: bool) -> None:
    for with_y in (True, False):
        for output, plain, hooks in ranks.run(TWO, run_toy, plan, length, with_y, by_name):
            assert torch.equal(output, plain)
            assert hooks == [0] * len(hooks)


def run_intrusive(mesh: ParallelMesh) -> tuple[bool, int, str]:
    model = Intrusive()
    _, handle = apply_sequence_parallel(model, {}, mesh)
    x = torch.arange(10.0).view(1, 5, 2)
    whole, local = model(x)
    handle.remove()
    with pytest.raises(RuntimeError, match="outside the forward of a parallelised model") as refused:
        model(x)
    return torch.equal(whole, x + 1), local, str(refused.value)


def test_a_model_may_shard_itself(ranks: RankPool) -> None:
    results = ranks.run(TWO, run_intrusive)
    assert [(equal, local) for equal, local, _ in results] == [(True, 3), (True, 2)]


def apply_wrongly(mesh: ParallelMesh) -> list[str]:
    said = []
    x = torch.rand(1, 4, 2)
    at_once: list[dict[str, Any]] = [{"blocks.0": {"z": SPLIT}}, {"nope": {"x": SPLIT}}]
    for plan in at_once:
        toy = Toy()
        with pytest.raises(ValueError) as refused:
            apply_sequence_parallel(toy, plan, mesh)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in toy.modules())
        said.append(str(refused.value))
    at_forward: list[dict[str, Any]] = [
        {"blocks.0": {"x": SequenceParallelInput(1, expected_dims=4)}},
        {"blocks.0": {3: SequenceParallelInput(1, split_output=True)}},
        {"blocks.0": [SequenceParallelOutput(1), None]},
    ]
    for plan in at_forward:
        toy = Toy()
        apply_sequence_parallel(toy, plan, mesh)
        with pytest.raises(ValueError) as refused:
            toy(x)
        said.append(str(refused.value))
    return said


def test_plans_that_do_not_apply(ranks: RankPool) -> None:
    for said in ranks.run(TWO, apply_wrongly):
        assert "Parameter 'z' not found in function signature of 'blocks.0'" in said[0]
        assert "'nope' (of the plan key 'nope') is not a submodule of Toy" in said[1]
        assert "has 3 dimensions (shape (1, 4, 2)), but the plan says expected_dims=4" in said[2]
        assert "Index 3 out of bounds for output of 'blocks.0'" in said[3]
        assert "Expected 2 outputs, got 1 from 'blocks.0'" in said[4]


class Joined(nn.Module):
    """Joins two streams inside the region and gathers the wrong thing, or each on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = TwoStreams()
        self.join = Join()
        self.leave = TwoStreams()

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> Any:
        text, image = self.enter(text, image)
        return self.join(text, image), self.leave(text, image)


class TwoStreams(nn.Module):
    def forward(self, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return text + 1, image + 1


class Join(nn.Module):
    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([text, image], dim=1)


def gather_two(mesh: ParallelMesh) -> tuple[bool, str]:
    enter = {"enter": {"text": SPLIT, "image": SPLIT}}
    text, image = torch.arange(2.0).view(1, 1, 2), torch.arange(10.0).view(1, 5, 2)
    each, joined = Joined(), Joined()
    apply_sequence_parallel(each, enter | {"leave": [SequenceParallelOutput(1), SequenceParallelOutput(1)]}, mesh)
    got = each(text, image)[1]
    apply_sequence_parallel(joined, enter | {"join": SequenceParallelOutput(1)}, mesh)
    with pytest.raises(ValueError) as refused:
        joined(text, image)
    return torch.equal(got[0], text + 2) and torch.equal(got[1], image + 2), str(refused.value)


def test_streams_are_gathered_each_on_its_own_or_not_at_all(ranks: RankPool) -> None:
    for equal, said in ranks.run(TWO, gather_two):
        assert equal  # the padding of the text, one token on two ranks, is gone as well
        assert "gather of shares [4, 3], but what was split lies on the ranks as" in said


def bypass(mesh: ParallelMesh) -> list[str]:
    said = []
    model, inputs = qwen.transformer(), qwen.inputs(height=4, width=3, text=5)
    parallelize(model, mesh)
    with pytest.raises(ValueError, match="is parallelised already") as refused:
        parallelize(model, mesh)
    said.append(str(refused.value))
    with attention_backend("_native_math"), pytest.raises(RuntimeError) as bypassed, torch.no_grad():
        model(**inputs)
    said.append(str(bypassed.value))
    own = qwen.transformer()
    own.set_attention_backend("_native_math")
    with pytest.raises(ValueError) as own_backend:
        parallelize(own, mesh)
    said.append(str(own_backend.value))
    return said


def test_attention_cannot_be_led_past_the_seam(ranks: RankPool) -> None:
    for said in ranks.run(TWO, bypass):
        assert "remove() that first" in said[0]
        assert "no attention of this region went across ranks" in said[1]
        assert "has its own attention backend" in said[2]


def remove_and_return(mesh: ParallelMesh) -> tuple[bool, bool]:
    model = qwen.transformer()
    inputs = qwen.inputs(height=4, width=3, text=5)
    with torch.no_grad():
        before = model(**inputs, return_dict=False)[0]
        for _ in range(2):  # and again after removal
            handle = parallelize(model, mesh)
            across = model(**inputs, return_dict=False)[0]
            handle.remove()
        after = model(**inputs, return_dict=False)[0]
    return torch.equal(before, after), bool((across - before).abs().max() < 1e-4)


def test_the_plain_model_comes_back_bit_for_bit(ranks: RankPool) -> None:
    assert ranks.run(TWO, remove_and_return) == [(True, True)] * 2


def test_models_that_nobody_knows_are_refused_by_name(ranks: RankPool) -> None:
    for said in ranks.run(TWO, parallelize_strangers):
        assert "Toy has no sequence-parallel plan" in said[0]
        assert "it has neither attention processors of diffusers nor a SequenceParallelAttention" in said[1]
        assert "blocks.0 (ToyBlock)" in said[2]


def parallelize_strangers(mesh: ParallelMesh) -> list[str]:
    said = []
    deaf = Toy()
    deaf.blocks[0].processor = ToyBlock()
    cases: list[tuple[nn.Module, Any]] = [(Toy(), None), (Toy(), PLANS[0]), (deaf, PLANS[0])]
    for model, plan in cases:
        with pytest.raises(ValueError) as refused:
            parallelize(model, mesh, plan)
        said.append(str(refused.value))
    return said


def test_a_mismatch_in_attention_is_an_error_and_not_a_picture(ranks: RankPool) -> None:
    for said in ranks.run(TWO, forget_a_split):
        assert "a split is missing from the plan" in said


def forget_a_split(mesh: ParallelMesh) -> str:
    model = qwen.transformer()
    plan: dict[str, Any] = {
        "pos_embed": {0: SequenceParallelInput(split_dim=0, split_output=True)},
        "transformer_blocks.0": {"hidden_states": SPLIT},
        "proj_out": SequenceParallelOutput(1),
    }
    parallelize(model, mesh, plan)
    with pytest.raises(ValueError) as refused, torch.no_grad():
        model(**qwen.inputs(height=4, width=3, text=5))
    return str(refused.value)


def test_other_models_keep_their_attention(ranks: RankPool) -> None:
    assert all(ranks.run(TWO, run_a_bystander))


def run_a_bystander(mesh: ParallelMesh) -> bool:
    bystander, inputs = qwen.transformer(seed=5), qwen.inputs(height=4, width=3, text=5)
    with torch.no_grad():
        before = bystander(**inputs, return_dict=False)[0]
        parallelize(qwen.transformer(), mesh)
        return torch.equal(before, bystander(**inputs, return_dict=False)[0])


def test_the_seam_still_fits_diffusers() -> None:
    """Private names of diffusers that the seam relies on; a release that moves them fails here first."""
    for name in ("register", "set_active_backend", "get_active_backend", "_backends", "_supported_arg_names"):
        assert hasattr(_AttentionBackendRegistry, name), name
    processors = [m.processor for m in qwen.transformer().modules() if hasattr(m, "processor")]
    assert len(processors) == 2
    assert all(p._parallel_config is None and p._attention_backend is None for p in processors)


def count_collectives(mesh: ParallelMesh, masked: bool) -> dict[str, int]:
    """How often one forward of two layers enters each collective."""
    counts = {"all_to_all_single": 0, "batch_isend_irecv": 0, "all_gather_single": 0, "all_reduce": 0}
    originals = {name: getattr(dist, name) for name in counts}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    model = qwen.transformer(layers=2)
    parallelize(model, mesh)
    inputs = qwen.inputs(height=5, width=3, text=8, mask=[[True] * 6 + [False] * 2] if masked else None)
    for name in counts:
        setattr(dist, name, counted(name))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("degrees", "exchanges", "shifts"),
    [
        (ParallelDegrees(ulysses_degree=3), 2, 0),
        (ParallelDegrees(ring_degree=3), 0, 2),
        (ParallelDegrees(ulysses_degree=2, ring_degree=2), 2, 1),
    ],
    ids=str,
)
def test_collectives_per_layer(
    ranks: RankPool, degrees: ParallelDegrees, exchanges: int, shifts: int, masked: bool
) -> None:
    """Ulysses: two exchanges a layer, with a mask too; ring: P - 1 shifts; and two for the gather behind the layers."""
    expected = {
        "all_to_all_single": 2 * exchanges,
        "batch_isend_irecv": 2 * shifts,
        "all_gather_single": 2,
        "all_reduce": 0,
    }
    assert ranks.run(degrees, count_collectives, masked) == [expected] * degrees.world_size


class Pair(NamedTuple):
    """An output with names."""

    left: torch.Tensor
    right: torch.Tensor | None


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> Pair:
        return Pair(x, None)


def split_named(mesh: ParallelMesh) -> tuple[str, tuple[int, ...], bool]:
    model = nn.Sequential(Named())
    plan: dict[str, Any] = {"0": {i: SequenceParallelInput(1, split_output=True) for i in (0, 1)}}
    apply_sequence_parallel(model, plan, mesh)
    output = model(torch.rand(1, 6, 2))
    return type(output).__name__, tuple(output.left.shape), output.right is None


def test_named_outputs_and_missing_ones(ranks: RankPool) -> None:
    assert ranks.run(TWO, split_named) == [("Pair", (1, 3, 2), True)] * 2
