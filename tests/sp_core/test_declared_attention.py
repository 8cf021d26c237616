"""What a family declares of its attention matters: without it the answer of several ranks is another, or none."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from sp_core.attention.diffusers_backend import _AtEnd
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.models.lookup import find_family
from sp_core.parallelize import parallelize
from sp_core.verify import examples
from sp_core.verify.divergence import error
from sp_core.verify.examples import Cell
from sp_core.verify.rank_pool import RankFailed, RankPool
from sp_core.verify.verify import BAR

CELL = ("uneven", "none", 2)


def without(mesh: ParallelMesh, name: str, declared: Any, cell: Cell = CELL) -> float:
    """How far the answer is from one process's, if the family declares this instead of what it does."""
    model = examples.TINY[name].model
    family = find_family([type(model).__name__])
    assert family is not None
    with torch.no_grad():
        inputs = examples.inputs(name, *cell)
        reference = model(**inputs, return_dict=False)[0]
        handle = parallelize(model, mesh, family=replace(family, **declared))
        try:
            found = model(**inputs, return_dict=False)[0]
        finally:
            handle.remove()
    return error(found, reference)


def test_a_scale_by_the_number_of_this_ranks_tokens_would_be_seen(ranks: RankPool) -> None:
    found = ranks.run(ParallelDegrees(ulysses_degree=2), without, "lumina-next proportional", {"scales_by_length": {}})
    assert min(found) > 100 * BAR


def hidden_in_front(mesh: ParallelMesh) -> str:
    """What is said of a text whose hidden tokens are in front of others."""
    model = examples.TINY["mochi"].model
    inputs = examples.inputs("mochi", *CELL)
    inputs["encoder_attention_mask"][1, 0] = False
    handle = parallelize(model, mesh)
    with pytest.raises(ValueError) as refused, torch.no_grad():
        model(**inputs)
    handle.remove()
    return str(refused.value)


def test_hidden_tokens_that_would_be_packed_are_refused(ranks: RankPool) -> None:
    for said in ranks.run(ParallelDegrees(ulysses_degree=2), hidden_in_front):
        assert said.startswith("encoder_attention_mask hides tokens in front of others; pad at the end")


def test_ranks_do_not_drop_hidden_tokens_by_themselves(ranks: RankPool) -> None:
    """Left to its processor, a rank holds as many tokens as the prompt has there: seen at the first attention."""
    said = r"keys on sequence rank \d, but the streams split before it|does not fit the plan on another rank"
    with pytest.raises(RankFailed, match=said):
        ranks.run(ParallelDegrees(ulysses_degree=2), without, "mochi", {"drops_hidden": {}}, ("uneven", "suffix", 2))


def test_a_mask_is_looked_at_once_and_again_when_it_has_changed() -> None:
    """On a GPU the host waits for it, and could not queue the next step meanwhile."""

    class Model(nn.Module):
        def forward(self, mask: torch.Tensor) -> torch.Tensor:
            return mask

    model, mask, check = Model(), torch.tensor([[1, 1, 0]]), _AtEnd("mask")
    check(model, (mask,), {})
    with mock.patch.object(torch.Tensor, "any", side_effect=AssertionError):
        check(model, (), {"mask": mask})
    check(model, (mask.clone(),), {})
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="mask hides tokens in front of others"):
        check(model, (mask,), {})
