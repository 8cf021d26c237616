"""A rank on a GPU queues a step before it waits for the last. Here ranks on CPU do: nothing else changes."""

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankPool
from tests.support.deployments import model
from workers.errors import PeerFailed, RequestCancelled, RequestFailed
from workers.gang.rank import Rank
from workers.messages import Drawn, GenerationRequest, StepEvent
from workers.model.denoising import Denoising
from workers.model.loader import load_model
from workers.model.step_ends import StepEnds

REQUEST = GenerationRequest("a", "demo", "a cup", 64, 48, 5, seed=3, report_steps=True)

LAYOUTS = [ParallelDegrees(), *(ParallelDegrees(ulysses_degree=world) for world in (2, 3, 4))]


def started(mesh: ParallelMesh, folder: Path, ahead: int) -> Rank:
    """A rank as `Rank.join` leaves it, that queues so many steps."""
    spec = model(folder, **asdict(mesh.degrees))
    rank = Rank(mesh.axis("gang").rank, spec)
    rank._use(load_model(spec, mesh))
    assert rank._ahead == 0
    rank._ahead = ahead
    return rank


def draw(mesh: ParallelMesh, folder: Path, steps: int) -> list[tuple[list[int], tuple[bytes, ...], int]]:
    """Steps that were reported, files, and steps that were queued at each report at most; with none and one ahead."""
    found = []
    for ahead in (0, 1):
        rank, most, queue = started(mesh, folder, ahead), 0, Denoising.step
        reported: list[int] = []

        def count(denoising: Denoising, queue: Any = queue, reported: list[int] = reported) -> None:
            nonlocal most
            queue(denoising)
            most = max(most, denoising._steps_done - len(reported))

        files: tuple[bytes, ...] = ()
        with mock.patch.object(Denoising, "step", count):
            for report in rank.generate(replace(REQUEST, num_inference_steps=steps)):
                if isinstance(report, StepEvent):
                    reported.append(report.step)
                else:
                    files = rank.answer(report.request_id).outputs
                    assert len(report.took.step_seconds) == steps
                    assert all(seconds > 0 for seconds in report.took.step_seconds)
        found.append((reported, files, most))
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("steps", [1, 5])
def test_the_same_picture_and_every_step(
    ranks: RankPool, demo_model: Path, layout: ParallelDegrees, steps: int
) -> None:
    (plain, ahead), *others = ranks.run(layout, draw, demo_model, steps)
    assert plain == (list(range(1, steps + 1)), plain[1], 1)
    assert ahead == (plain[0], plain[1], min(2, steps))
    assert plain[1]
    for other in others:
        assert [(reported, files) for reported, files, _ in other] == [([], ())] * 2


def spoil(mesh: ParallelMesh, folder: Path, step: int) -> tuple[str, str, int, bool]:
    """The last rank's latents are not finite after a step. What is raised, steps queued, is the next request drawn."""
    rank, mark, queued = started(mesh, folder, 1), StepEnds.mark, 0
    last = mesh.axis("gang").rank == mesh.axis("gang").size - 1

    def spoiled(ends: StepEnds, latents: torch.Tensor, *rest: Any) -> None:
        nonlocal queued
        queued += 1
        mark(ends, latents * float("nan") if last and queued == step else latents, *rest)

    with mock.patch.object(StepEnds, "mark", spoiled), pytest.raises(RequestFailed) as failed:
        list(rank.generate(REQUEST))
    drawn = any(isinstance(report, Drawn) for report in rank.generate(replace(REQUEST, request_id="next")))
    return type(failed.value).__name__, str(failed.value), queued, drawn


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_the_step_that_is_not_finite_is_named(
    ranks: RankPool, demo_model: Path, layout: ParallelDegrees, step: int
) -> None:
    *others, (kind, said, *_) = found = ranks.run(layout, spoil, demo_model, step)
    reason = f"rank {len(others)}: FloatingPointError: the latents are not finite after step {step} of 5"
    assert (kind, said) == ("RequestFailed", reason)
    assert {kind for kind, *_ in others} <= {PeerFailed.__name__}
    assert {queued for *_, queued, _ in found} == {min(step + 1, 5)}
    assert found[0][3]


def cancel(mesh: ParallelMesh, folder: Path, during: int) -> tuple[int, int]:
    """Steps that were queued and reported when a request was canceled, on one rank only, while a step was queued."""
    rank, queue, queued = started(mesh, folder, 1), Denoising.step, 0

    def step(denoising: Denoising) -> None:
        nonlocal queued
        queue(denoising)
        queued += 1
        if queued == during and mesh.axis("gang").rank == 0:
            rank.cancel(REQUEST.request_id)

    reported = 0
    with mock.patch.object(Denoising, "step", step), pytest.raises(RequestCancelled):
        for _ in rank.generate(REQUEST):
            reported += 1
    return queued, reported


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_a_cancellation_takes_effect_within_a_step(ranks: RankPool, demo_model: Path, layout: ParallelDegrees) -> None:
    found = ranks.run(layout, cancel, demo_model, 3)
    assert {queued for queued, _ in found} == {3}  # none after it
    assert found[0][1] == 1  # the boundary after the second step was crossed, by all, with the cancellation


def test_seconds_are_from_end_to_end() -> None:
    ends = StepEnds(torch.device("cpu"), 2)
    began = time.perf_counter()
    for _ in range(2):
        while time.perf_counter() - began < 0.02:
            pass
        ends.mark(torch.zeros(3))
    took = time.perf_counter() - began
    first, second = ends.wait(1), ends.wait(2)
    assert (first.step, second.step, first.finite) == (1, 2, True)
    assert 0.02 <= first.seconds + second.seconds <= took + 0.01
    assert second.seconds < first.seconds


def test_no_pinned_memory_and_no_event_without_a_gpu() -> None:
    with ExitStack() as stack:
        for name in ("Event", "synchronize"):
            stack.enter_context(mock.patch.object(torch.cuda, name, side_effect=AssertionError(name)))
        ends = StepEnds(torch.device("cpu"), 1)
        ends.mark(torch.tensor([float("inf")]))
        assert not ends.wait(1).finite
