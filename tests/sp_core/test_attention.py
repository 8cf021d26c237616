"""SequenceParallelAttention alone: random lengths, heads, masks, joint tokens and degrees against one process."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from sp_core.attention.layer import SequenceParallelAttention
from sp_core.attention.region_attention import attention_kept_local
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput, SequenceParallelPartialInput
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR

HEAD_SIZE = 4
MASKS = ("none", "keys", "additive keys", "per head", "square", "square per head", "one row", "least keys", "least")


@dataclass(frozen=True)
class Case:
    """One attention: `text` and `image` are split, `joint` tokens are whole on every rank."""

    image: int
    text: int = 0
    joint: int = 0
    strategy: str = "front"
    key_heads: int = 4
    group: int = 1
    batch: int = 1
    mask: str = "none"
    auto_pad: bool = False

    @property
    def total(self) -> int:
        return self.image + self.text + self.joint


class Attend(nn.Module):
    """Queries, keys and values follow one another in the last dimension of each stream."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.attention = SequenceParallelAttention()
        self.leave = nn.Identity()
        streams = ["text", "image"] if case.text else ["image"]
        self._sp_plan = {
            "": {name: SequenceParallelInput(split_dim=1, expected_dims=3, auto_pad=case.auto_pad) for name in streams},
            "leave": SequenceParallelOutput(gather_dim=1, stream="image"),
        }

    def forward(
        self, image: torch.Tensor, text: torch.Tensor | None, joint: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The image's tokens, in which all others have left their mark."""
        streams = [stream for stream in (text, image) if stream is not None]
        joined = torch.cat(streams, dim=1)
        extra: dict[str, Any] = {"joint_strategy": self.case.strategy}
        if joint is not None:
            names = ("joint_query", "joint_key", "joint_value")
            extra |= dict(zip(names, self._heads(joint), strict=True))
        attended = self.attention(*self._heads(joined), mask, **extra)
        image_end = attended.shape[1] - (self.case.joint if self.case.strategy == "rear" else 0)
        own: torch.Tensor = self.leave(attended[:, image_end - image.shape[1] : image_end].flatten(2))
        return own

    def _heads(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        heads = self.case.key_heads * self.case.group
        split = tokens.unflatten(2, (-1, HEAD_SIZE)).split([heads, self.case.key_heads, self.case.key_heads], dim=2)
        return list(split)


def inputs(case: Case) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(case.image * 31 + case.text)
    width = case.key_heads * (case.group + 2) * HEAD_SIZE

    def tokens(count: int) -> torch.Tensor | None:
        return torch.randn(case.batch, count, width, generator=generator) * 2 if count else None

    return {
        "image": tokens(case.image), "text": tokens(case.text), "joint": tokens(case.joint),
        "mask": a_mask(case, generator),
    }  # fmt: skip


def a_mask(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    """Over all keys, in the order in which the tokens are joined; some rows see nothing at all."""
    batch, heads, total = case.batch, case.key_heads * case.group, case.total
    shapes: dict[str, tuple[int, ...]] = {
        "keys": (batch, total), "additive keys": (1, total), "per head": (batch, heads, 1, total),
        "square": (1, 1, total, total), "square per head": (batch, heads, total, total), "one row": (batch, total),
        "least keys": (batch, total), "least": (1, 1, total, total),
    }  # fmt: skip
    if case.mask == "none":
        return None
    visible = torch.rand(shapes[case.mask], generator=generator) > 0.4
    if case.mask in ("one row", "least keys"):
        visible[0] = False
    if case.mask == "least":
        visible[..., ::2, :] = False
    if case.mask.startswith("least"):
        return torch.zeros(shapes[case.mask]).masked_fill(~visible, torch.finfo(torch.float32).min)
    if case.mask == "additive keys":
        return torch.randn(shapes[case.mask], generator=generator).masked_fill(~visible, float("-inf"))
    return visible


def forward(case: Case, mesh: ParallelMesh | None = None) -> torch.Tensor:
    model = Attend(case)
    handle = parallelize(model, mesh) if mesh else None
    with torch.no_grad():
        output: torch.Tensor = model(**inputs(case))
    if handle:
        handle.remove()
        with torch.no_grad():
            assert torch.equal(model(**inputs(case)), forward(case))
    return output


def on_rank(mesh: ParallelMesh, case: Case, local: bool = False) -> torch.Tensor:
    if not local:
        return forward(case, mesh)
    with attention_kept_local():
        return forward(case, mesh)


LAYOUTS = [
    ParallelDegrees(ulysses_degree=ulysses, ring_degree=ring)
    for ulysses, ring in ((2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 2))
]

cases = st.builds(
    Case,
    image=st.integers(1, 20),
    text=st.integers(0, 9),
    joint=st.integers(0, 4),
    strategy=st.sampled_from(["front", "rear"]),
    key_heads=st.integers(1, 7),
    group=st.integers(1, 4),
    batch=st.integers(1, 2),
    mask=st.sampled_from(MASKS),
    auto_pad=st.booleans(),
)


@given(case=cases, layout=st.sampled_from(LAYOUTS))
@settings(
    max_examples=120, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
def test_any_attention_is_that_of_one_process(ranks: RankPool, case: Case, layout: ParallelDegrees) -> None:
    reference = forward(case)
    assert torch.isfinite(reference).all()
    for output in ranks.run(layout, on_rank, case):
        assert error(output, reference) <= BAR


CONTROLS = [
    Case(image=12, text=5, mask=mask, joint=joint, strategy=strategy, key_heads=key_heads, group=group, batch=2)
    for mask in ("none", "keys", "additive keys", "one row", "least keys")
    for joint, strategy in ((0, "front"), (3, "front"), (3, "rear"))
    for key_heads, group in ((6, 1), (3, 2))
]


@pytest.mark.parametrize("case", CONTROLS, ids=str)
def test_local_attention_would_be_seen(ranks: RankPool, case: Case) -> None:
    for layout in (LAYOUTS[0], LAYOUTS[2]):
        reference = forward(case)
        assert all(error(output, reference) <= BAR for output in ranks.run(layout, on_rank, case))
        assert max(error(output, reference) for output in ranks.run(layout, on_rank, case, True)) > 100 * BAR


@pytest.mark.parametrize("mask", ["square", "per head", "square per head", "least"])
def test_a_mask_of_the_whole_matters(ranks: RankPool, mask: str) -> None:
    """The control of masks that a local attention cannot even take: without them the answer is another."""
    case = Case(image=12, text=5, mask=mask)
    assert error(forward(replace(case, mask="none")), forward(case)) > 100 * BAR


class Partial(nn.Module):
    """`[text, image]` in one tensor, of which the text stays whole."""

    def __init__(self, source: str | int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PartialBlock(), PartialBlock()])
        self._sp_plan = {
            "blocks.0": {"hidden_states": SequenceParallelPartialInput(1, source, expected_dims=3)},
            "blocks.-1": SequenceParallelOutput(gather_dim=1),
        }

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, text, text.shape[0])
        return hidden_states


class PartialBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SequenceParallelAttention()

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, text_len: int) -> torch.Tensor:
        heads = hidden_states.unflatten(2, (4, 4))
        return hidden_states + self.attention(heads * 2, heads, heads).flatten(2)


def run_partial(mesh: ParallelMesh, source: str | int, image: int) -> float:
    model, text = Partial(source), torch.ones(3, 2)
    tokens = torch.randn(2, 3 + image, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = model(tokens, text)
        parallelize(model, mesh)
        return error(model(tokens, text), reference)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("source", ["text", "text_len", 3])
def test_text_in_front_may_stay_whole(ranks: RankPool, source: str | int, layout: ParallelDegrees) -> None:
    for image in (8, 7, 1):
        assert max(ranks.run(layout, run_partial, source, image)) <= BAR


def wrong_calls(mesh: ParallelMesh) -> list[str]:
    said = []
    attention, x = SequenceParallelAttention(), torch.rand(1, 4, 2, 4)
    for arguments in ({"joint_query": x}, {"joint_strategy": "middle"}):
        with pytest.raises(ValueError) as refused:
            attention(x, x, x, **arguments)
        said.append(str(refused.value))
    model = Attend(Case(image=6))
    parallelize(model, mesh)
    for mask in (torch.ones(1, 6, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool), torch.ones(6, 6)):
        with pytest.raises(ValueError) as refused:
            model(**inputs(Case(image=6)) | {"mask": mask})
        said.append(str(refused.value))
    return said


def test_calls_that_contradict_themselves(ranks: RankPool) -> None:
    for said in ranks.run(LAYOUTS[0], wrong_calls):
        assert "give all three or none" in said[0]
        assert "must be 'front' or 'rear', got 'middle'" in said[1]
        assert "a mask must be boolean or floating (additive), got torch.int64" in said[2]
        assert "has a mask of shape (1, 5); this rank holds 3 of 6 tokens" in said[3]
        assert "has a mask of shape (6, 6) for a batch of 1" in said[4]
