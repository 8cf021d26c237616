"""Law 1 on the transformer: every sequence-parallel layout gives one process's answer; local attention does not."""

import dataclasses
from typing import Any

import pytest
import torch

from sp_core.degrees import ParallelDegrees
from sp_core.hooks import apply_sequence_parallel
from sp_core.mesh import ParallelMesh
from sp_core.models.qwen_image import QWEN_IMAGE
from sp_core.parallelize import parallelize
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support import qwen

CASES: dict[str, dict[str, Any]] = {
    "even": {"height": 6, "width": 4, "text": 12},
    "uneven": {"height": 5, "width": 5, "text": 7},
    "streams of almost one length": {"height": 4, "width": 4, "text": 17},
    "text shorter than the world": {"height": 3, "width": 3, "text": 1},
    "image shorter than the world": {"height": 1, "width": 1, "text": 2},
    "suffix mask": {"height": 6, "width": 4, "text": 8, "batch": 2, "mask": [[True] * 8, [True] * 5 + [False] * 3]},
    "scattered mask, uneven": {
        "height": 5, "width": 3, "text": 9, "batch": 2,
        "mask": [[True, False, True] * 3, [False] * 4 + [True, True, False, True, True]],
    },
    "all text masked": {"height": 5, "width": 3, "text": 5, "mask": [[False] * 5]},
}  # fmt: skip


LAYOUTS = {
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
    "ulysses 3": ParallelDegrees(ulysses_degree=3),
    "ulysses 4": ParallelDegrees(ulysses_degree=4),
    "ring 2": ParallelDegrees(ring_degree=2),
    "ring 3": ParallelDegrees(ring_degree=3),
    "ring 4": ParallelDegrees(ring_degree=4),
    "ulysses 2 x ring 2": ParallelDegrees(ulysses_degree=2, ring_degree=2),
}


def forward(mesh: ParallelMesh, case: dict[str, Any], attention: str) -> torch.Tensor:
    model = qwen.transformer()
    if attention == "across ranks":
        parallelize(model, mesh)
    else:  # the negative control: split and gather, but no attention across ranks
        apply_sequence_parallel(model, QWEN_IMAGE.sp_plan, mesh)
    with torch.no_grad():
        return model(**qwen.inputs(**case), return_dict=False)[0]


def one_process(case: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return qwen.transformer()(**qwen.inputs(**case), return_dict=False)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_every_layout_gives_the_answer_of_one_process(ranks: RankPool, name: str, layout: str) -> None:
    reference = one_process(CASES[name])
    for output in ranks.run(LAYOUTS[layout], forward, CASES[name], "across ranks"):
        assert error(output, reference) <= BAR


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_local_attention_would_be_seen(ranks: RankPool, name: str, world: int) -> None:
    outputs = ranks.run(ParallelDegrees(ulysses_degree=world), forward, CASES[name], "local")
    assert max(error(output, one_process(CASES[name])) for output in outputs) > 100 * BAR


def forward_padded(mesh: ParallelMesh, case: dict[str, Any]) -> torch.Tensor:
    """With `auto_pad` on every split of the plan: equal shares, the padding hidden from attention and trimmed."""
    plan: dict[str, Any] = {
        name: {key: dataclasses.replace(split, auto_pad=True) for key, split in entry.items()}
        if isinstance(entry, dict)
        else entry
        for name, entry in QWEN_IMAGE.sp_plan.items()
    }
    model = qwen.transformer()
    parallelize(model, mesh, plan)
    with torch.no_grad():
        return model(**qwen.inputs(**case), return_dict=False)[0]


@pytest.mark.parametrize("layout", ["ulysses 4", "ring 4", "ulysses 2 x ring 2"])
@pytest.mark.parametrize("name", ["uneven", "scattered mask, uneven", "text shorter than the world"])
def test_padded_shares_give_the_same_answer(ranks: RankPool, name: str, layout: str) -> None:
    for output in ranks.run(LAYOUTS[layout], forward_padded, CASES[name]):
        assert error(output, one_process(CASES[name])) <= BAR
