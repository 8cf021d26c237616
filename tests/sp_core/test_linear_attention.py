"""Linear attention over ranks: diffusers' answer, one sum whatever the length, and what is refused."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.transformer_sana_video import SanaLinearAttnProcessor3_0, WanRotaryPosEmbed
from torch import nn

from sp_core.attention.region_attention import attention_kept_local
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.models.family import ModelFamily
from sp_core.parallelize import parallelize
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelModelPlan, SequenceParallelOutput
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.sp_core.test_same_answer import LAYOUTS

HEADS, SIZE, BATCH = 5, 12, 2

_ROTATION = SequenceParallelInput(split_dim=1, split_output=True)
PLAN: SequenceParallelModelPlan = {
    "rope": {0: _ROTATION, 1: _ROTATION},
    "attn": {"hidden_states": SequenceParallelInput(split_dim=1)},
    "out": SequenceParallelOutput(gather_dim=1),
}
FAMILY = ModelFamily((), PLAN, linear_processors=("SanaLinearAttnProcessor2_0", "SanaLinearAttnProcessor3_0"))

LENGTHS = (24, 17, 3, 1)


class Attends(nn.Module):
    """One self-attention, without or with rotations of a grid of one column."""

    def __init__(self, rotated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rotated = rotated
        self.rope, self.out = WanRotaryPosEmbed(SIZE, (1, 1, 1), 64), nn.Identity()
        processor = SanaLinearAttnProcessor3_0() if rotated else SanaLinearAttnProcessor2_0()
        norm = "rms_norm_across_heads" if rotated else None
        self.attn = Attention(
            HEADS * SIZE, heads=HEADS, kv_heads=HEADS, dim_head=SIZE, qk_norm=norm, processor=processor
        )

    def forward(self, hidden_states: torch.Tensor, **more: Any) -> Any:
        rotation = self.rope(torch.empty(1, 1, 1, hidden_states.shape[1], 1))
        return self.out(self.attn(hidden_states, **({"rotary_emb": rotation} if self.rotated else {}), **more))


def tokens_of(length: int) -> torch.Tensor:
    return torch.randn(BATCH, length, HEADS * SIZE, generator=torch.Generator().manual_seed(1))


def attend(mesh: ParallelMesh, rotated: bool) -> tuple[list[float], list[float], list[dict[Any, float]]]:
    """For each length the distance from one process, the same with attention kept local, and what the sums sent."""
    model = Attends(rotated)
    with torch.no_grad():
        plain = [model(tokens_of(length)) for length in LENGTHS]
        handle = parallelize(model, mesh, PLAN, family=FAMILY)
        across, local, sent = [], [], []
        for length, reference in zip(LENGTHS, plain, strict=True):
            mesh.traffic.take_sent()
            across.append(error(model(tokens_of(length)), reference))
            sent.append(mesh.traffic.take_sent())
            with attention_kept_local():
                local.append(error(model(tokens_of(length)), reference))
        handle.remove()
        assert torch.equal(model(tokens_of(LENGTHS[0])), plain[0])
    return across, local, sent


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_answer_of_one_process(ranks: RankPool, layout: str, rotated: bool) -> None:
    size = LAYOUTS[layout].world_size
    for across, local, sent in ranks.run(LAYOUTS[layout], attend, rotated):
        assert max(across) <= BAR
        assert min(local[:-1]) > 100 * BAR  # the last has one token: it attends to itself
        matrix = BATCH * HEADS * (SIZE + 1) * SIZE * 4
        assert [each["all_reduce"] for each in sent] == pytest.approx([2 * (size - 1) / size * matrix] * len(LENGTHS))
        assert all(set(each) == {"all_reduce", "gather"} for each in sent)


def masked(mesh: ParallelMesh) -> Any:
    model = Attends(False)
    parallelize(model, mesh, PLAN, family=FAMILY)
    return model(tokens_of(8), attention_mask=torch.ones(BATCH, 8))


def test_a_mask_is_refused(ranks: RankPool) -> None:
    with pytest.raises(RuntimeError, match="linear attention 'attn' is given a mask"):
        ranks.run(ParallelDegrees(ulysses_degree=2), masked)


def unknown(mesh: ParallelMesh, names: tuple[str, ...]) -> Any:
    return parallelize(Attends(False), mesh, PLAN, family=ModelFamily((), PLAN, linear_processors=names))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "processors that do not go through diffusers' dispatch"),
        (("SanaLinearAttnProcessor2_0", "Other"), "has Other; allowed: SanaLinear"),
    ],
)
def test_other_linear_attention_is_refused(ranks: RankPool, names: tuple[str, ...], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        ranks.run(ParallelDegrees(ulysses_degree=2), unknown, names)
