"""A mesh whose groups return wrong data is refused, with the group's name; one that is right passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sp_core import collectives
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import MeshAxis, ParallelMesh
from sp_core.probe import WrongGroup, probe
from sp_core.verify.rank_pool import RankPool
from tests.support.toys import TWO

THREE = ParallelDegrees(ulysses_degree=3)
GRID = ParallelDegrees(ulysses_degree=2, ring_degree=2)


def probed(mesh: ParallelMesh) -> list[str]:
    probe(mesh)
    return [axis.name for axis in mesh.axes if axis.size > 1]


def test_sound_groups_pass(ranks: RankPool) -> None:
    probe(ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60))  # one rank has no group
    assert ranks.run(THREE, probed) == [["gang", "sequence", "ulysses"]] * 3
    assert ranks.run(GRID, probed) == [["gang", "sequence", "ring", "ulysses"]] * 4


def permuted(call: Callable[..., Any]) -> Callable[..., Any]:
    """As NCCL did: the right parts in the wrong order, and only of messages that are large."""

    def wrong(tensor: torch.Tensor, axis: MeshAxis) -> list[torch.Tensor]:
        parts = call(tensor, axis)
        return parts[::-1] if tensor.numel() > 1000 else parts

    return wrong


def off_by_one(call: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any) -> Any:
        made = call(*args)
        return made + (made.numel() > 0)

    return wrong


class Echo:
    """A shift that returns what was sent."""

    def __init__(self, tensor: torch.Tensor, receive_shape: Any, axis: MeshAxis) -> None:
        collectives_shift(tensor, receive_shape, axis).wait()
        self._tensor = tensor

    def wait(self) -> torch.Tensor:
        return self._tensor


collectives_shift = collectives.RingShift

FAULTS: dict[str, tuple[str, Any]] = {
    "all-gather": ("all_gather_equal", permuted(collectives.all_gather_equal)),
    "all-to-all": ("all_to_all", off_by_one(collectives.all_to_all)),
    "all-reduce": ("all_reduce", off_by_one(collectives.all_reduce)),
    "shift": ("RingShift", Echo),
}


def refused(mesh: ParallelMesh, fault: str, axis: str, only: int | None) -> str:
    """What the probe says where one collective is wrong, on one axis, on one rank or all."""
    name, wrong = FAULTS[fault]
    right = getattr(collectives, name)

    def call(*args: Any) -> Any:
        struck = args[-1].name == axis and only in (None, args[-1].rank)
        return (wrong if struck else right)(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, name, call)
        with pytest.raises(WrongGroup) as error:
            probe(mesh)
    return str(error.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_collective_is_refused_on_all_ranks(ranks: RankPool, fault: str) -> None:
    assert all(f"the group gang ({fault})" in said for said in ranks.run(TWO, refused, fault, "gang", None))


def test_one_rank_that_received_wrong_data_stops_all(ranks: RankPool) -> None:
    said = ranks.run(TWO, refused, "all-reduce", "gang", 1)
    assert ["gang (on another rank)" in said[0], "gang (all-reduce)" in said[1]] == [True, True]


def test_the_group_is_named(ranks: RankPool) -> None:
    said = ranks.run(GRID, refused, "all-gather", "ring", None)
    assert all("the group ring (all-gather)" in each for each in said)
