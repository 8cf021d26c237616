"""Ranks keep the modulation of timesteps that they have seen, and give the same answer with it."""

from typing import Any

import pytest
import torch
from torch import nn

from sp_core import shared_modulation
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.shared_modulation import same_timestep
from sp_core.verify import examples
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.sp_core.test_replacements import one_rank, worst
from tests.sp_core.test_shared_modulation import MODULATED, SHARING, branches, count_products


def at(model: nn.Module, name: str, timestep: float, texts: int = 2) -> list[torch.Tensor]:
    """A guided step, or a part of it, at a timestep that the caller vouches for."""
    time = "timestep" if name == "qwen-image" else "t"
    with torch.no_grad(), same_timestep(timestep):
        return [
            model(**inputs | {time: torch.tensor([timestep])}, return_dict=False)[0][0]
            for inputs in branches(name)[:texts]
        ]


def unshared(model: nn.Module, name: str, timestep: float) -> list[torch.Tensor]:
    time = "timestep" if name == "qwen-image" else "t"
    with torch.no_grad():
        return [
            model(**inputs | {time: torch.tensor([timestep])}, return_dict=False)[0][0] for inputs in branches(name)
        ]


SCHEDULES = {"one after the other": (0.9, 0.2, 0.9, 0.2), "in turns": (0.9, 0.9, 0.5, 0.2, 0.5, 0.2)}
"""Timesteps of two requests; in turns, the second has another schedule at first."""


@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize("name", MODULATED)
def test_a_timestep_that_was_seen_needs_no_product(name: str, order: str) -> None:
    model = examples.TINY[name].build()
    expected = {timestep: unshared(model, name, timestep) for timestep in set(SCHEDULES[order])}
    parallelize(model, one_rank())
    calls = count_products(model)
    for timestep in SCHEDULES[order]:
        found = at(model, name, timestep)
        assert all(torch.equal(a, b) for a, b in zip(found, expected[timestep], strict=True))
    assert len(calls) == MODULATED[name] * len(expected)
    assert error(at(model, name, 0.9)[0], expected[0.2][0]) > 100 * BAR


def test_layers_are_given_their_values_at_addresses_that_stay() -> None:
    """torch.compile takes them for parameters: a CUDA graph would be recorded again at each new address."""
    model: Any = examples.TINY["qwen-image"].build()
    parallelize(model, one_rank())
    seen: list[int] = []
    layer = model.transformer_blocks[0].img_mod
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: seen.append(layer.shared.data_ptr()))
    for timestep in (0.9, 0.2, 0.5, 0.9):
        at(model, "qwen-image", timestep)
    assert len(seen) == 8
    assert len(set(seen)) == 1


def test_what_was_used_least_recently_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    name, products = "qwen-image", MODULATED["qwen-image"]
    model: Any = examples.TINY[name].build()
    monkeypatch.setattr(shared_modulation, "KEPT_BYTES", 2 * products * 6 * 144 * 4)  # of two timesteps
    parallelize(model, one_rank())
    calls = count_products(model)
    for timestep, computed in ((0.9, 1), (0.5, 2), (0.9, 2), (0.2, 3), (0.9, 3), (0.5, 4)):
        at(model, name, timestep, texts=1)
        assert len(calls) == computed * products, timestep


def test_what_is_kept_of_a_batch_is_one_row() -> None:
    """Pictures of one request, and both branches of guidance in one forward, have one timestep.

    Another batch computes it anew: its last bits may differ, and a picture may not depend on what ran before.
    """
    name, products = "qwen-image", MODULATED["qwen-image"]
    model: Any = examples.TINY[name].build()
    given = {batch: examples.inputs(name, "uneven", "none", batch) for batch in (1, 2)}
    with torch.no_grad():
        expected = {batch: model(**inputs)[0] for batch, inputs in given.items()}
    parallelize(model, one_rank())
    calls = count_products(model)
    for batch, times in ((2, 1), (1, 2), (2, 2)):
        with torch.no_grad(), same_timestep(0.5):
            found = model(**given[batch])[0]
        assert error(found, expected[batch]) <= BAR
        assert len(calls) == times * products


def test_gradients_are_not_mixed_up_with_what_is_kept() -> None:
    name, products = "qwen-image", MODULATED["qwen-image"]
    model: Any = examples.TINY[name].build()
    parallelize(model, one_rank())
    calls = count_products(model)
    at(model, name, 0.5)
    for _ in range(2):
        calls.clear()
        with same_timestep(0.5):
            model(**examples.inputs(name, "uneven", "none", 1))
        assert len(calls) == products


def keep_on_ranks(mesh: ParallelMesh, lost: int) -> tuple[float, list[int]]:
    """The difference to one process, and the products of each step. Before the last step one rank loses what it kept:
    all must enter the same collectives nevertheless."""
    model: Any = examples.TINY["qwen-image"].build()
    reference = {timestep: unshared(model, "qwen-image", timestep) for timestep in (0.9, 0.2)}
    parallelize(model, mesh)
    calls, products, differences = count_products(model), [], []
    for turn, timestep in enumerate((0.9, 0.2, 0.9, 0.2)):
        if turn == 3 and mesh.axis("gang").rank == lost:
            calls.clear()
            shared_modulation.KEPT_BYTES, kept = 0, shared_modulation.KEPT_BYTES
            at(model, "qwen-image", 0.9)
            shared_modulation.KEPT_BYTES = kept
        elif turn == 3:
            at(model, "qwen-image", 0.9)
        calls.clear()
        differences.append(worst(at(model, "qwen-image", timestep), reference[timestep]))
        products.append(len(calls))
    return max(differences), products


@pytest.mark.parametrize("layout", ["ulysses 2", "ring 3", "tp 2 x ulysses 2", "cfg 2 x ulysses 2"])
def test_ranks_keep_their_shares(ranks: RankPool, layout: str) -> None:
    found = ranks.run(SHARING[layout], keep_on_ranks, 1)
    degrees = SHARING[layout]
    sharing = degrees.tensor_parallel_size * degrees.sequence_parallel_size
    for rank, (difference, products) in enumerate(found):
        assert difference <= BAR
        assert products[2:] == [0, products[0] if rank == 1 else 0]
    assert sum(products[0] for _, products in found) == MODULATED["qwen-image"] * degrees.world_size // sharing
