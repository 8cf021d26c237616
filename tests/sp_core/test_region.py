"""What is split in a running forward: regions follow one another, forwards contain one another, and all end."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from sp_core.attention.region_attention import attention_kept_local
from sp_core.degrees import ParallelDegrees
from sp_core.hooks import apply_sequence_parallel
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.region import RunningForward, SequenceContext
from sp_core.sp_plan import SequenceParallelOutput
from sp_core.sp_sharding import sp_active, sp_gather, sp_shard
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR, BLIND
from tests.support import qwen
from tests.support.toys import SPLIT, TWO, Toy

X = torch.arange(10.0).view(1, 5, 2)


def one_rank() -> ParallelMesh:
    return ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)


def test_a_context_does_not_change() -> None:
    context = SequenceContext(one_rank())
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.order_known = False  # type: ignore[misc]
    assert SequenceContext.numbered(context.number) is context


class Twice(nn.Module):
    """Two regions one after the other, the second with two streams."""

    def forward(self, x: torch.Tensor) -> Any:
        first = sp_gather(sp_shard(x, 1) + 1, 1)
        one, other = sp_shard(first, 1), sp_shard(first[:, :4], 1)
        running = RunningForward.innermost()
        assert running is not None
        return sp_gather(one, 1), sp_gather(other, 1), list(running.region.streams)


def run_twice(mesh: ParallelMesh) -> bool:
    model = Twice()
    apply_sequence_parallel(model, {}, mesh)
    one, other, streams = model(X)
    return torch.equal(one, X + 1) and torch.equal(other, X[:, :4] + 1) and streams == ["sp_shard.1", "sp_shard.2"]


def test_streams_of_a_second_region_have_their_own_names(ranks: RankPool) -> None:
    assert ranks.run(TWO, run_twice) == [True] * 2


class Outer(nn.Module):
    """Runs another parallelized model between its own split and gather."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.others = [inner]  # not a submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = sp_shard(x, 1)
        inner = self.others[0](x[:, :3], None)
        return sp_gather(share, 1) + inner.sum()


def run_nested(mesh: ParallelMesh) -> tuple[bool, bool]:
    inner = Toy()
    apply_sequence_parallel(inner, {"blocks.0": {"x": SPLIT}, "outputs.main": [SequenceParallelOutput(1)]}, mesh)
    outer = Outer(inner)
    apply_sequence_parallel(outer, {}, mesh)
    return torch.equal(outer(X), X + 4 * X[:, :3].sum()), sp_active()


def test_a_forward_may_contain_another(ranks: RankPool) -> None:
    assert ranks.run(TWO, run_nested) == [(True, False)] * 2


def test_a_module_of_the_plan_is_not_called_alone() -> None:
    model = Toy()
    handle = apply_sequence_parallel(model, {"blocks.0": {"x": SPLIT}}, one_rank())
    with pytest.raises(RuntimeError, match="was called outside its model's forward"):
        model.blocks[0](X)
    handle.remove()
    assert torch.equal(model.blocks[0](X), 2 * X)


def with_and_without_control(mesh: ParallelMesh) -> tuple[float, float, float]:
    model, inputs = qwen.transformer(), qwen.inputs(height=4, width=3, text=5)
    with torch.no_grad():
        reference = model(**inputs, return_dict=False)[0]
        parallelize(model, mesh)
        before = error(model(**inputs, return_dict=False)[0], reference)
        with attention_kept_local():
            inside = error(model(**inputs, return_dict=False)[0], reference)
        return before, inside, error(model(**inputs, return_dict=False)[0], reference)


def test_the_negative_control_ends_with_its_block(ranks: RankPool) -> None:
    for before, inside, after in ranks.run(TWO, with_and_without_control):
        assert max(before, after) <= BAR
        assert inside > BLIND
