"""Who is in which group, and the decision that all ranks share; how tokens lie on ranks."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sp_core import collectives
from sp_core.collectives import gather
from sp_core.degrees import ParallelDegrees, axis_groups, head_cost, head_shares, layout_advice
from sp_core.mesh import ParallelMesh
from sp_core.token_layout import Stream, TokenLayout
from sp_core.verify.rank_pool import RankPool
from tests.support.toys import TWO

CPU = torch.device("cpu")

ROOT = Path(__file__).resolve().parents[2]


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


def waits(mesh: ParallelMesh) -> tuple[float, float]:
    """Seconds that a decision may wait, and a collective of another group."""
    made = ParallelMesh.create(TWO, device_type="cpu", timeout_s=60, control_timeout_s=90)
    group = made.axis("gang").group
    assert group is not None and made.control is not None
    options = [each._get_backend(CPU).options._timeout.total_seconds() for each in (made.control, group)]
    return options[0], options[1]


def test_a_decision_may_wait_longer_for_a_rank_that_loads(ranks: RankPool) -> None:
    assert ranks.run(TWO, waits) == [(90.0, 60.0)] * 2


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


def shared_groups(mesh: ParallelMesh) -> tuple[bool, bool]:
    gang, sequence, ulysses, ring = (mesh.axis(name) for name in ("gang", "sequence", "ulysses", "ring"))
    return gang.group is sequence.group, sequence.group in (ulysses.group, ring.group)


def test_axes_of_the_same_ranks_share_a_group(ranks: RankPool) -> None:
    assert ranks.run(ParallelDegrees(ring_degree=3), shared_groups) == [(True, True)] * 3
    assert ranks.run(ParallelDegrees(ulysses_degree=2, ring_degree=2), shared_groups) == [(True, False)] * 4
    assert ranks.run(ParallelDegrees(ulysses_degree=2, cfg_parallel_size=2), shared_groups) == [(False, True)] * 4


@pytest.mark.parametrize(
    ("heads", "degree", "shares", "cost"),
    [(12, 4, [3, 3, 3, 3], 1.0), (30, 4, [8, 8, 8, 6], 32 / 30), (5, 4, [2, 2, 1, 0], 1.6), (2, 4, [1, 1, 0, 0], 2.0)],
)
def test_heads_that_do_not_divide(heads: int, degree: int, shares: list[int], cost: float) -> None:
    assert head_shares(heads, degree) == shares
    assert head_cost(heads, degree) == pytest.approx(cost)


def test_advice_on_layouts() -> None:
    assert layout_advice(ParallelDegrees(ulysses_degree=3), 30) is None
    assert layout_advice(ParallelDegrees(ulysses_degree=4), None) is None
    said = layout_advice(ParallelDegrees(ulysses_degree=8), 30)
    assert said == (
        "ulysses_degree=8 shares 30 attention heads as 4, 4, 4, 4, 4, 4, 4, 2, so attention takes 1.07x an even "
        "share's time; ulysses_degree=2 x ring_degree=4 shares them evenly"
    )


def test_places_of_tokens_in_the_whole() -> None:
    """Text of 3 and image of 5 on two ranks, one token of each joint in front."""
    streams = (Stream(3, 2), Stream(5, 2, padded=True))
    cpu = torch.device("cpu")
    first, second = (TokenLayout(streams, rank).after(1) for rank in (0, 1))
    assert (first.lengths, first.local, first.total, first.replicated) == ([5, 4], 6, 9, 1)
    assert first.order(cpu).tolist() == [0, 1, 2, 4, 5, 6, 3, 7, 8, -1]
    assert second.own_order(cpu).tolist() == [0, 3, 7, 8, -1]
    assert second.real(cpu).tolist() == [True, True, True, True, False]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="only the first stream's can"):
        TokenLayout((Stream(3, 2), Stream(5, 2, replicated=2)), 0)
    with pytest.raises(ValueError, match="in which order attention joins"):
        TokenLayout(streams, 0, order_known=False).order(cpu)


def hand_out(mesh: ParallelMesh) -> tuple[list[bytes], list[list[list[int]]]]:
    rank = mesh.axis("gang").rank
    texts = [mesh.broadcast(text if rank == 0 else None) for text in (b"", b"picture", bytes(range(256)) * 999)]
    texts.append(mesh.broadcast(b"of rank" + b"!" * rank))  # all pass something: rank 0's counts
    own = [torch.full((n, rank + 1), float(rank)) for n in range(1, rank + 2)]
    return texts, [[list(tensor.shape) for tensor in theirs] for theirs in gather(own, mesh.axis("gang"))]


def hand_over_in_batches(mesh: ParallelMesh) -> tuple[list[list[float]], int]:
    """What rank 0 has of all, and the most messages of a batch here."""
    batches: list[int] = []
    send = dist.batch_isend_irecv

    def counted(messages: list[dist.P2POp]) -> list[dist.Work]:
        batches.append(len(messages))
        return list(send(messages))

    rank = mesh.axis("gang").rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "MOST_MESSAGES", 4)
        patch.setattr(dist, "batch_isend_irecv", counted)
        got = gather([torch.tensor([10.0 * rank + n]) for n in range(5 * rank + 1)], mesh.axis("gang"))
    return [[float(each) for each in theirs] for theirs in got], max(batches)


@pytest.mark.parametrize("size", [2, 3])
def test_many_tensors_are_handed_over_in_batches(ranks: RankPool, size: int) -> None:
    found = ranks.run(ParallelDegrees(ulysses_degree=size), hand_over_in_batches)
    assert found[0][0] == [[10.0 * rank + n for n in range(5 * rank + 1)] for rank in range(size)]
    assert max(most for _, most in found) <= 4


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_hand_out_bytes_and_tensors_of_any_shape(ranks: RankPool, size: int) -> None:
    """Through tensors only: torch's way for objects unpickles, and runs, what a peer sends."""
    found = ranks.run(ParallelDegrees(ulysses_degree=size), hand_out)
    shapes = [[[n, rank + 1] for n in range(1, rank + 2)] for rank in range(size)]
    for rank, (texts, gathered) in enumerate(found):
        assert texts == [b"", b"picture", bytes(range(256)) * 999, b"of rank"]
        assert gathered == ([] if rank else shapes)


def test_nothing_that_peers_send_is_unpickled() -> None:
    sources = [path.read_text() for layer in ("sp_core", "workers") for path in (ROOT / layer).rglob("*.py")]
    unpickling = re.compile(r"_object\(|_object_list\(|weights_only=False|pickle\.loads?\(")
    assert [found for source in sources for found in unpickling.findall(source)] == []
