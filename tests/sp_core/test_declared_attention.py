"""What a family declares of its attention matters: without it the answer of several ranks is another, or none."""

from dataclasses import replace
from typing import Any

import torch

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.models.lookup import find_family
from sp_core.parallelize import parallelize
from sp_core.verify import examples
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR

CELL = ("uneven", "none", 2)


def without(mesh: ParallelMesh, name: str, declared: Any) -> float:
    """How far the answer is from one process's, if the family declares this instead."""
    model = examples.TINY[name].model
    family = find_family([type(model).__name__])
    assert family is not None
    with torch.no_grad():
        inputs = examples.inputs(name, *CELL)
        reference = model(**inputs, return_dict=False)[0]
        handle = parallelize(model, mesh, family=replace(family, **declared))
        found = model(**inputs, return_dict=False)[0]
    handle.remove()
    return error(found, reference)


def test_a_scale_by_the_number_of_this_ranks_tokens_would_be_seen(ranks: RankPool) -> None:
    found = ranks.run(ParallelDegrees(ulysses_degree=2), without, "lumina-next proportional", {"scales_by_length": {}})
    assert min(found) > 100 * BAR
