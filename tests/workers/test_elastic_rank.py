"""A rank of an elastic gang: parts of requests on changing blocks, what it keeps of them, its warm-up."""

import gzip
import io
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.model_sections import Elastic, WarmupShape
from sp_core.degrees import ParallelDegrees, smaller_layouts
from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankPool
from tests.support.deployments import model
from tests.workers.test_adapters import PICTURES
from tests.workers.test_denoising import ALONE, generate
from workers.gang.elastic_rank import KEEP_STEPS, ElasticRank, Turnstile
from workers.messages import Drawn, Kept, Part, Profiled, StepEvent
from workers.model.loader import load_model

TWO = ParallelDegrees(ulysses_degree=2)
STEPS = 9
REQUEST = replace(PICTURES, n=1, num_inference_steps=STEPS, negative_prompt="blurry", request_id="a")


def started(folder: Path, ahead: int, **options: Any) -> ElasticRank:
    """A rank as `join` leaves it, that queues so many steps."""
    mesh = ParallelMesh.create(TWO, device_type="cpu", timeout_s=60, smaller=smaller_layouts(TWO, 1))
    shapes = (WarmupShape(width=64, height=48),)
    spec = model(folder, **asdict(TWO)).model_copy(update={"elastic": Elastic(), "warmup_shapes": shapes, **options})
    rank = ElasticRank(mesh.axis("gang").rank, spec)
    rank._use(load_model(spec, mesh))
    rank._ahead = ahead
    return rank


def draw(mesh: ParallelMesh, folder: Path, ahead: int) -> tuple[list[str], list[int], int, bytes]:
    """Both ranks begin a request and leave it; the first ends it alone. What was reported, the steps, where it was
    left, and the picture.
    """
    rank, said, steps = started(folder, ahead), [], []
    encoded = mesh.broadcast(rank.encode(REQUEST) if rank.rank == 0 else None)
    rank.pause("a", 1)
    rank.pause("b", 1)  # another request, on another block
    left, file = Kept(0, b"", False), b""
    for report in rank.advance(Part(REQUEST, 1, 2, encoded)):
        said.append(type(report).__name__)
        if isinstance(report, StepEvent):
            steps.append(report.step)
        if isinstance(report, Kept):
            left = report
    assert rank._loaded.mesh.degrees == TWO
    if rank.rank == 0:
        for report in rank.advance(Part(REQUEST, 2, 1, encoded, left.progress)):
            said.append(type(report).__name__)
            if isinstance(report, StepEvent):
                steps.append(report.step)
            if isinstance(report, Drawn):
                (file,) = rank.answer("a").outputs
        assert rank._loaded.mesh.degrees == ALONE
    return said, steps, left.steps_done, file


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_request_is_left_after_a_step_and_ended_by_one_rank(
    ranks: RankPool, demo_models: dict[str, Path], ahead: int
) -> None:
    folder = demo_models["qwen-image"]
    first, second = ranks.run(TWO, draw, folder, ahead)
    said, steps, left_at, file = first
    assert steps == list(range(1, STEPS + 1))
    assert left_at == 1 + ahead  # a step that was queued is done as well
    assert second == ([], [], 0, b"")
    kept = [i for i, name in enumerate(said) if name == "Kept"]
    assert said[-1] == "Drawn" and kept[0] == left_at
    assert len(kept) == 1 + (STEPS - 1 - left_at) // KEEP_STEPS
    ((_, (expected,)),) = ranks.run(ALONE, generate, folder, REQUEST)
    assert np.abs(np.asarray(Image.open(io.BytesIO(file)), dtype=np.int16) - expected).max() <= 1


def profiled(mesh: ParallelMesh, folder: Path, wanted: bool) -> list[tuple[int, int, bool]]:
    """Of each profile that a rank reports of a whole request: the rank, its steps, and whether it saw exchanges."""
    rank, request = started(folder, 0), replace(REQUEST, num_inference_steps=3, profile=wanted)
    encoded = mesh.broadcast(rank.encode(request) if rank.rank == 0 else None)
    reports = [report for report in rank.advance(Part(request, 1, 2, encoded)) if isinstance(report, Profiled)]
    return [
        (each.rank, each.steps, b"alltoall" in gzip.decompress(each.trace) and each.communication_seconds > 0)
        for each in reports
    ]


@pytest.mark.parametrize("wanted", [True, False])
def test_each_rank_of_a_block_profiles_its_steps(ranks: RankPool, demo_models: dict[str, Path], wanted: bool) -> None:
    found = ranks.run(TWO, profiled, demo_models["qwen-image"], wanted)
    assert found == [[(rank, 3, True)] if wanted else [] for rank in range(2)]


def observed(mesh: ParallelMesh, folder: Path) -> int:
    """How often this rank tells what a request took of its memory."""
    rank, told = started(folder, 0), []
    rank.telemetry.observe_drawn = lambda *_: told.append(1)  # type: ignore[method-assign]
    encoded = mesh.broadcast(rank.encode(REQUEST) if rank.rank == 0 else None)
    for _ in rank.advance(Part(REQUEST, 1, 2, encoded)):
        pass
    return len(told)


def test_all_ranks_of_a_request_tell_of_their_memory(ranks: RankPool, demo_models: dict[str, Path]) -> None:
    assert ranks.run(TWO, observed, demo_models["qwen-image"]) == [1, 1]


def warmed(mesh: ParallelMesh, folder: Path) -> list[tuple[str, int]]:
    """The layouts of the parts that the warm-up ran on this rank, and how many pictures were left there."""
    rank, seen = started(folder, 0), []
    advance = ElasticRank._advance

    def noted(self: ElasticRank, part: Part) -> object:
        yield from advance(self, part)
        seen.append((str(self._loaded.mesh.degrees), part.request.n))

    ElasticRank._advance = noted  # type: ignore[method-assign, assignment]
    try:
        rank._warm_up()
    finally:
        ElasticRank._advance = advance  # type: ignore[method-assign]
    assert rank._loaded.mesh.degrees == TWO and not rank._encoding._waiting
    return seen


def test_every_degree_is_warmed_up(ranks: RankPool, demo_models: dict[str, Path]) -> None:
    for seen in ranks.run(TWO, warmed, demo_models["qwen-image"]):
        assert {layout for layout, _ in seen} == {"ulysses_degree=2", "1 rank"}


def test_who_visits_computes_between_two_steps() -> None:
    turnstile, order = Turnstile(), []

    def visit() -> None:
        with turnstile.visit():
            order.append("visit")

    visitor = threading.Thread(target=visit)
    with turnstile.inside():
        visitor.start()
        while not turnstile._waiting:
            time.sleep(0.001)
        order.append("step 1")
        turnstile.let_pass()
        order.append("step 2")
        turnstile.let_pass()  # nobody waits
    visitor.join()
    assert order == ["step 1", "visit", "step 2"]
