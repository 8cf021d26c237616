"""What the record of a region says is compared between the ranks once, and not exchanged again."""

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from sp_core import collectives, region
from sp_core.attention.layer import SequenceParallelAttention
from sp_core.degrees import ParallelDegrees
from sp_core.hooks import apply_sequence_parallel
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput
from sp_core.sp_sharding import sp_gather, sp_shard
from sp_core.verify import examples
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.toys import SPLIT

LAYOUTS = {
    2: ParallelDegrees(ulysses_degree=2),
    3: ParallelDegrees(ring_degree=3),
    4: ParallelDegrees(ulysses_degree=2, ring_degree=2),
}
GATHERS = {"qwen-image": (1, 1), "wan": (1, 1), "flux": (1, 1), "z-image": (3, 0)}
"""Of a first forward, and of one with other lengths. Z-Image refines image and text apart before it joins them; it pads
either to the same 32 tokens in both."""

sizes = pytest.mark.parametrize("size", LAYOUTS)


class Asked:
    """Counts inside its block how often this rank asks the others for their lengths, or whether something fits."""

    def __init__(self) -> None:
        self.lengths = self.fits = 0

    def __enter__(self) -> "Asked":
        self._patch = pytest.MonkeyPatch()
        all_lengths, on_any_rank = collectives.all_lengths, collectives.on_any_rank

        def lengths(*args: Any) -> list[int]:
            self.lengths += 1
            return all_lengths(*args)

        def fits(*args: Any) -> bool:
            self.fits += 1
            return on_any_rank(*args)

        self._patch.setattr(collectives, "all_lengths", lengths)
        self._patch.setattr(collectives, "on_any_rank", fits)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def asked_in_forwards(mesh: ParallelMesh, name: str) -> tuple[list[tuple[int, bool]], float]:
    """What each forward asked, and the worst difference to one process."""
    model: Any = examples.TINY[name].build()
    given = [examples.inputs(name, length, "none", 1) for length in ("uneven", "even")]
    with torch.no_grad():
        expected = [model(**each, return_dict=False)[0] for each in given]
        parallelize(model, mesh)
        asked, worst = [], 0.0
        for which in (0, 0, 1, 0, 1):
            with Asked() as each:
                output = model(**given[which], return_dict=False)[0]
            asked.append((each.lengths, each.fits > 0))
            worst = max(worst, *(error(a, b) for a, b in zip(output, expected[which], strict=True)))
    return asked, worst


@sizes
@pytest.mark.parametrize("name", GATHERS)
def test_only_new_lengths_are_compared_and_only_a_first_forward_asks_more(
    ranks: RankPool, name: str, size: int
) -> None:
    first, other = GATHERS[name]
    for asked, worst in ranks.run(LAYOUTS[size], asked_in_forwards, name):
        assert asked == [(first, True), (0, False), (other, False), (0, False), (0, False)]
        assert worst <= BAR


class Deviating(nn.Module):
    """Gathers too few tokens on some ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Identity(), Cut()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.leave(self.enter(hidden_states))
        return out


class Cut(nn.Module):
    cut = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.cut :]


PLAN: Any = {"enter": {"input": SPLIT}, "leave": SequenceParallelOutput(1)}
X = torch.arange(22.0).view(1, 11, 2)


def deviating(mesh: ParallelMesh, with_one: bool) -> tuple[list[str], bool, int]:
    """What is said where the last rank deviates, at first and again; whether the same model is then right; what it
    asks when all deviate later."""
    model = Deviating()
    apply_sequence_parallel(model, PLAN, mesh)
    axis, said = mesh.axis("sequence"), []
    for _ in range(2):
        model.leave.cut = int(axis.rank == axis.size - 1) if with_one else 1
        with pytest.raises(ValueError) as refused:
            model(X)
        said.append(str(refused.value))
    model.leave.cut = 0
    right = torch.equal(model(X), X)
    model.leave.cut = 1
    with Asked() as asked, pytest.raises(ValueError) as refused:
        model(X)
    return [*said, str(refused.value)], right, asked.lengths


@sizes
@pytest.mark.parametrize("with_one", [True, False])
def test_a_wrong_record_raises_on_all_ranks(ranks: RankPool, size: int, with_one: bool) -> None:
    shares = [len(share) for share in torch.arange(11).tensor_split(size)]
    wrong = [*shares[:-1], shares[-1] - 1] if with_one else [share - 1 for share in shares]
    for rank, (said, right, lengths) in enumerate(ranks.run(LAYOUTS[size], deviating, with_one)):
        known = f"but what was split lies on the ranks as {{'enter.input': {shares}}}"
        assert said[0] == said[1] == f"gather of shares {wrong}, {known}"
        assert said[2] == f"gather of {shares[rank] - 1} tokens on sequence rank {rank}, {known}"
        assert right
        assert lengths == 0


class Unnamed(nn.Module):
    """Gathers one of two streams that are split alike on some ranks only, without saying which."""

    which = 0

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return sp_gather((sp_shard(text, 1), sp_shard(image, 1))[self.which], 1)


def unnamed(mesh: ParallelMesh) -> tuple[list[bool], int]:
    size = mesh.axis("sequence").size
    model, streams = Unnamed(), [torch.randn(1, 2 * size - 1, 2), torch.randn(1, 2 * size, 2)]
    apply_sequence_parallel(model, {}, mesh)
    right = []
    with Asked() as asked:
        for model.which in (0, 1, 1, 0):
            right.append(model(*streams).shape == streams[model.which].shape)
    return right, asked.lengths


@sizes
def test_lengths_are_exchanged_where_the_record_leaves_the_stream_open(ranks: RankPool, size: int) -> None:
    assert ranks.run(LAYOUTS[size], unnamed) == [([True] * 4, 4)] * size


def forgetful(mesh: ParallelMesh) -> tuple[list[int], bool]:
    model, found, right = Deviating(), [], True
    apply_sequence_parallel(model, PLAN, mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(region, "_REMEMBERED", 2)
        for tokens in (9, 10, 11, 9, 11):
            with Asked() as asked:
                right &= torch.equal(model(X[:, :tokens]), X[:, :tokens])
            found.append(asked.lengths)
    return found, right


def test_what_is_forgotten_is_compared_again(ranks: RankPool) -> None:
    assert ranks.run(LAYOUTS[3], forgetful) == [([1, 1, 1, 1, 0], True)] * 3


class Attending(nn.Module):
    """Attends with a mask that it is given."""

    _sp_plan: ClassVar[Any] = {"": {"x": SequenceParallelInput(1)}, "leave": SequenceParallelOutput(1)}

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.leave = SequenceParallelAttention(), nn.Identity()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        heads = x.unflatten(2, (4, 4))
        attended: torch.Tensor = self.leave(self.attention(heads, heads, heads, mask).flatten(2))
        return attended


def masked_wrongly(mesh: ParallelMesh) -> tuple[list[str], float]:
    """What is said of a mask that does not fit on the last rank, twice; and whether the same model is then right."""
    model, said, x = Attending(), [], torch.randn(1, 11, 16, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    parallelize(model, mesh)
    axis = mesh.axis("sequence")
    wrong = torch.ones(1, 17, dtype=torch.bool) if axis.rank == axis.size - 1 else None
    for _ in range(2):
        with pytest.raises(ValueError) as refused:
            model(x, wrong)
        said.append(str(refused.value))
    return said, error(model(x), expected)


@sizes
def test_an_attention_that_has_never_fitted_raises_on_all_ranks_each_time(ranks: RankPool, size: int) -> None:
    for rank, (said, difference) in enumerate(ranks.run(LAYOUTS[size], masked_wrongly)):
        words = (
            "has a mask of shape (1, 17)" if rank == size - 1 else "does not fit the plan on another rank; see there"
        )
        assert all(words in each for each in said), said
        assert difference <= BAR
