"""The plan at work on small models: every kind of parameter and output is split and gathered, or refused loudly."""

from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from sp_core.hooks import apply_sequence_parallel
from sp_core.mesh import ParallelMesh
from sp_core.sp_plan import (
    OptionalSequenceParallelInput,
    SequenceParallelCompanion,
    SequenceParallelInput,
    SequenceParallelLeadingCount,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
)
from sp_core.sp_sharding import sp_active, sp_gather, sp_shard
from sp_core.verify.rank_pool import RankPool
from tests.support.toys import SPLIT, TWO, Intrusive, Toy

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
    handle = apply_sequence_parallel(toy, plan, mesh)
    x = torch.arange(2.0 * length * 3).view(2, length, 3)
    y = torch.ones_like(x) if with_y else None
    output = toy(x=x, y=y) if by_name else toy(x, y)
    handle.remove()
    return output, toy(x, y), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in toy.modules()]


@pytest.mark.parametrize("length", [4, 5, 1])
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=["at the first block", "at the root", "after the first block"])
def test_hooks_split_and_gather_and_go(ranks: RankPool, plan: Any, length: int, by_name: bool) -> None:
    for with_y in (True, False):
        for output, plain, hooks in ranks.run(TWO, run_toy, plan, length, with_y, by_name):
            assert torch.equal(output, plain)
            assert hooks == [0] * len(hooks)


def run_intrusive(mesh: ParallelMesh) -> tuple[bool, int, str]:
    model = Intrusive()
    handle = apply_sequence_parallel(model, {}, mesh)
    x = torch.arange(10.0).view(1, 5, 2)
    whole, local = model(x)
    handle.remove()
    with pytest.raises(RuntimeError, match="outside the forward of a parallelized model") as refused:
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
        assert "'nope' is not a submodule of Toy in Toy (plan key 'nope')" in said[1]
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


class Anything(nn.Module):
    """Returns what it is given, in the wrapping that it is told."""

    def __init__(self, wrap: str = "") -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Any, n: int | None = None, text: Any = None) -> Any:
        if self.wrap == "model output":
            return Transformer2DModelOutput(sample=x)
        if self.wrap == "dict":
            return {"sample": x, "none": None}
        if self.wrap == "pair":
            return x, None
        return (x, n) if n is not None else x


GATHER = SequenceParallelOutput(gather_dim=1)
OUT = SequenceParallelInput(split_dim=1, split_output=True)


def split_and_gather(mesh: ParallelMesh, enter: Any, leave: Any, inner: str, outer: str, arguments: Any) -> Any:
    """What the first module gives on this rank, and the second one after it."""
    model = nn.Sequential(Anything(inner), Anything(outer))
    seen: list[Any] = []
    apply_sequence_parallel(model, {"0": enter, "1": leave} if leave else {"0": enter}, mesh)
    model[1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    return seen, model(*arguments)


X = torch.arange(20.0).view(2, 5, 2)


def test_model_outputs_are_kept(ranks: RankPool) -> None:
    for _, output in ranks.run(TWO, split_and_gather, {"x": SPLIT}, GATHER, "", "model output", (X,)):
        assert isinstance(output, Transformer2DModelOutput)
        assert torch.equal(output.sample, X)
        assert output.sample.is_contiguous()  # some forwards view it in another shape
    for rank, (seen, _) in enumerate(ranks.run(TWO, split_and_gather, {0: OUT}, None, "model output", "", (X,))):
        assert isinstance(seen[0], Transformer2DModelOutput)
        assert torch.equal(seen[0].sample, X[:, :3] if rank == 0 else X[:, 3:])


def test_dicts_and_pairs_with_none(ranks: RankPool) -> None:
    for seen, _ in ranks.run(TWO, split_and_gather, {0: OUT, 1: OUT}, None, "dict", "", (X,)):
        assert seen[0]["sample"].shape[1] in (2, 3)
        assert seen[0]["none"] is None
    for _, output in ranks.run(TWO, split_and_gather, {"x": SPLIT}, [GATHER, None], "", "pair", (X,)):
        assert torch.equal(output[0], X)
        assert output[1] is None


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_of_tensors(ranks: RankPool, kind: type) -> None:
    each = {"x": [SPLIT, None]}
    for seen, _ in ranks.run(TWO, split_and_gather, each, None, "", "", (kind([X, X]),)):
        assert type(seen[0]) is kind
        assert [t.shape[1] < 5 for t in seen[0]] == [True, False]
    for seen, _ in ranks.run(
        TWO, split_and_gather, {"x": SequenceParallelCompanion(1)}, None, "", "", (kind([X] * 3),)
    ):
        assert all(t.shape[1] < 5 for t in seen[0])
    within = {"x": [None, SequenceParallelCompanion(1)]}
    for seen, _ in ranks.run(TWO, split_and_gather, within, None, "", "", (kind([kind([X]), kind([X, X])]),)):
        assert type(seen[0]) is type(seen[0][1]) is kind
        assert seen[0][0][0].shape[1] == 5 and all(t.shape[1] < 5 for t in seen[0][1])


def test_tensors_by_key(ranks: RankPool) -> None:
    given = {0: X, 5: X}
    for seen, _ in ranks.run(TWO, split_and_gather, {"x": SequenceParallelCompanion(1)}, None, "", "", (given,)):
        assert {key: each.shape[1] < 5 for key, each in seen[0].items()} == {0: True, 5: True}
    with pytest.raises(RuntimeError, match="Unsupported input type for sharding: x of '0' is dict"):
        ranks.run(TWO, split_and_gather, {"x": SPLIT}, None, "", "", (given,))


def test_what_a_list_may_not_be(ranks: RankPool) -> None:
    for enter, given, says in (
        ({"x": SPLIT}, [X], "Expected list/tuple of SequenceParallelInput for x of '0'"),
        ({"x": [SPLIT, None]}, [X], "Expected 2 elements in x of '0', as the plan says; got 1"),
        ({"x": [SPLIT, None]}, X, "Expected SequenceParallelInput for tensor parameter x of '0'"),
        ({"x": SPLIT}, 7, "Unsupported input type for sharding: x of '0' is int"),
        ({"x": [SPLIT, SPLIT]}, [X, "x"], "Unsupported input type for sharding: x of '0' is str"),
        ({"x": SequenceParallelPartialInput(1, "text")}, X, "Parameter 'text' is None, cannot determine text length"),
        ({"x": SequenceParallelPartialInput(1, 5)}, X, "5 tokens are to stay whole, but dimension 1 of shape"),
    ):
        with pytest.raises(RuntimeError) as refused:
            ranks.run(TWO, split_and_gather, enter, None, "", "", (given,))
        assert says in str(refused.value)


def with_text(mesh: ParallelMesh, text: Any) -> Any:
    model = Anything()
    apply_sequence_parallel(model, {"": {"x": SequenceParallelPartialInput(1, "text")}}, mesh)
    return model(X, text=text)


def test_the_length_of_a_text(ranks: RankPool) -> None:
    for text in (2, torch.ones(2, 7)):
        assert [x.shape[1] for x in ranks.run(TWO, with_text, text)] == [4, 3]
    with pytest.raises(RuntimeError, match="Failed to resolve text_len_source 'text'"):
        ranks.run(TWO, with_text, "two")


def count(mesh: ParallelMesh, n: Any, stream: str) -> Any:
    model = Anything()
    apply_sequence_parallel(model, {"": {"x": SPLIT, "n": SequenceParallelLeadingCount(stream)}}, mesh)
    return model(X, n)


def test_a_count_of_leading_tokens(ranks: RankPool) -> None:
    for n, shares in ((2, [2, 0]), (4, [3, 1]), (5, [3, 2])):
        assert [output[1] for output in ranks.run(TWO, count, n, "x")] == shares
    for n, stream, says in (("4", "x", "n of '' is str"), (4, "y", "attention over the stream 'y'")):
        with pytest.raises(RuntimeError, match=says):
            ranks.run(TWO, count, n, stream)


def optional(mesh: ParallelMesh, entry: Any, x: Any) -> Any:
    model = Anything()
    apply_sequence_parallel(model, {"": {"x": entry}}, mesh)
    return tuple(model(x).shape)


def test_optional_entries(ranks: RankPool) -> None:
    tokens = OptionalSequenceParallelInput(split_dim=1, expected_dims=2)
    per_token = SequenceParallelCompanion(split_dim=1, optional=True)
    for entry, x, shape in (
        (tokens, torch.ones(4), (4,)),
        (tokens, torch.ones(2, 4), (2, 2)),
        (per_token, torch.ones(4), (4,)),
        (per_token, torch.ones(2, 1), (2, 1)),
        (per_token, torch.ones(2, 4, 1), (2, 2, 1)),
        (SequenceParallelCompanion(split_dim=-2), torch.ones(4, 3), (2, 3)),
    ):
        assert ranks.run(TWO, optional, entry, x) == [shape] * 2


class TwoRegions(nn.Module):
    """Gathers twice from one region, and then splits again at another length."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        share = sp_shard(x, 1)
        keys, values = sp_gather(share, 1), sp_gather(share + 1, 1)
        longer = torch.cat((keys, values), 1)[:, :7]
        return keys, values, sp_gather(sp_shard(longer, 1) * 2, 1)


def run_two_regions(mesh: ParallelMesh) -> bool:
    model = TwoRegions()
    apply_sequence_parallel(model, {}, mesh)
    keys, values, doubled = model(X)
    return (
        torch.equal(keys, X)
        and torch.equal(values, X + 1)
        and torch.equal(doubled, torch.cat((X, X + 1), 1)[:, :7] * 2)
    )


def test_several_gathers_and_several_regions(ranks: RankPool) -> None:
    assert ranks.run(TWO, run_two_regions) == [True] * 2


class TwoByTwo(nn.Module):
    """Two streams, gathered by two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.text_out, self.out = nn.Identity(), nn.Identity()

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> Any:
        return self.text_out(text), self.out(image)


def gather_alike(mesh: ParallelMesh, text: int, image: int, named: bool, pad: bool) -> Any:
    model = TwoByTwo()
    split = SequenceParallelInput(1, auto_pad=pad)
    plan = {
        "": {"text": split, "image": split},
        "text_out": SequenceParallelOutput(1, stream="text" if named else None),
        "out": SequenceParallelOutput(1, stream="image" if named else None),
    }
    apply_sequence_parallel(model, plan, mesh)
    shapes = tuple(torch.arange(2.0 * n).view(1, n, 2) for n in (text, image))
    return all(torch.equal(a, b) for a, b in zip(model(*shapes), shapes, strict=True))


def test_streams_that_lie_alike_must_be_named(ranks: RankPool) -> None:
    for text, image, pad in ((1, 2, False), (5, 6, True)):
        assert ranks.run(TWO, gather_alike, text, image, True, pad) == [True] * 2
        with pytest.raises(RuntimeError, match="these may belong to any of the streams"):
            ranks.run(TWO, gather_alike, text, image, False, pad)
    assert ranks.run(TWO, gather_alike, 4, 7, False, False) == [True] * 2


def pad_one(mesh: ParallelMesh) -> Any:
    model = nn.Sequential(Anything(), Anything())
    plan = {"0": {"x": SequenceParallelInput(1, auto_pad=True)}, "1": {"text": SequenceParallelCompanion(1)}}
    context = apply_sequence_parallel(model, plan, mesh).context
    assert context is not None
    seen = []
    model[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["text"].shape[1]), with_kwargs=True
    )
    context.begin()  # the model itself passes no text on
    x = model[0](X)
    model[1](x, text=X)
    context.end()
    return x.shape[1], seen


def test_what_goes_along_is_padded_with_its_stream(ranks: RankPool) -> None:
    assert ranks.run(TWO, pad_one) == [(3, [3])] * 2


def interrupted(mesh: ParallelMesh) -> bool:
    model = Intrusive()
    handle = apply_sequence_parallel(model, {}, mesh)
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        model(X)
    assert sp_active()
    handle.remove()
    return sp_active()


def test_an_interrupted_forward_leaves_nothing_behind(ranks: RankPool) -> None:
    assert ranks.run(TWO, interrupted) == [False] * 2


def shard_rotations(mesh: ParallelMesh) -> list[tuple[int, ...]]:
    class Rotations(nn.Module):
        def forward(self, x: torch.Tensor) -> list[tuple[int, ...]]:
            parts = sp_shard(x, 1), sp_shard(x[..., None], 1), sp_shard(x, 1, companion=True), sp_shard(x > 3, 1)
            return [tuple(part.shape) for part in parts] + [tuple(sp_gather(parts[0], 1).shape)]

    model = Rotations()
    context = apply_sequence_parallel(model, {}, mesh).context
    assert context is not None
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(len(context.running().region.streams)), prepend=True)
    shapes = model(X)
    assert seen == [1]
    return shapes


def test_only_tokens_become_streams(ranks: RankPool) -> None:
    for rank, shapes in enumerate(ranks.run(TWO, shard_rotations)):
        assert [shape[1] for shape in shapes] == [3 - rank] * 4 + [5]
