"""A rank that is slow by itself is told apart from communication, and named: the others wait, it does not."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankPool
from tests.support.deployments import model
from workers.gang.boundary import REMEMBERED, Boundary
from workers.messages import GenerationRequest
from workers.model.denoising import Denoising
from workers.model.loader import load_model

REQUEST = GenerationRequest("a", "demo", "a fox", width=64, height=96, num_inference_steps=3, seed=3, profile=True)
"""Profiled, so that each of its steps is timed."""

LATE_S = 0.4


def waits(mesh: ParallelMesh, folder: Path, slow: int) -> list[tuple[float, float, float]]:
    """Of each step of a request: its seconds, those in collectives, those of waiting for slower ranks."""
    loaded = load_model(model(folder, **asdict(mesh.degrees)), mesh)
    if mesh.axis("gang").rank == slow:
        block = loaded.pipeline.transformer.transformer_blocks[0]
        block.register_forward_pre_hook(lambda *_: time.sleep(LATE_S))
    denoising = Denoising(loaded, REQUEST)
    denoising.encode()
    denoising.share_encoded()
    denoising.prepare()
    boundary, found = Boundary(mesh.axis("gang").rank), []
    for end in denoising.steps(0):
        assert end.in_collectives is not None
        spent = sum(end.in_collectives.values())
        found.append((end.seconds, spent, boundary.cross(mesh, REQUEST, None, spent)))
    assert (denoising.prompt_tokens > 2) == (mesh.axis("gang").rank == 0)  # which has the text encoder
    return found


@pytest.mark.parametrize("degrees", [ParallelDegrees(ulysses_degree=2), ParallelDegrees(ring_degree=3)], ids=str)
def test_the_slow_rank_waits_for_nobody(ranks: RankPool, demo_model: Path, degrees: ParallelDegrees) -> None:
    slow = degrees.world_size - 1
    found: list[Any] = ranks.run(degrees, waits, demo_model, slow)
    for steps in found:
        for seconds, spent, waited in steps:
            assert 0 <= waited <= spent < seconds
    waited = [sum(step[2] for step in steps) for steps in found]  # of three sleeps; a busy machine hides a part
    assert all(each - waited[slow] > LATE_S for each in waited[:slow]), waited
    assert all(min(step[2] for step in steps) == 0 for steps in zip(*found, strict=True))


def test_without_a_slow_rank_nobody_waits_that_long(ranks: RankPool, demo_model: Path) -> None:
    """The control: the same without the sleep."""
    found = ranks.run(ParallelDegrees(ulysses_degree=2), waits, demo_model, -1)
    first, second = (sum(step[2] for step in steps) for steps in found)
    assert abs(first - second) < LATE_S


def test_pauses_that_come_too_late_do_not_gather() -> None:
    boundary = Boundary(0)
    for number in range(REMEMBERED + 100):
        boundary.pause(str(number), 1)
    assert len(boundary._paused) == REMEMBERED and str(REMEMBERED + 99) in boundary._paused
