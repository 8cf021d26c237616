"""What else a request asks for holds while its ranks change: adapters, previews, cancellation, compiled blocks."""

import functools
import io
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from deploy.model_sections import Elastic, LoRA, WarmupShape
from sp_core.degrees import ParallelDegrees, smaller_layouts
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.deployments import model
from tests.workers.test_adapters import differ
from tests.workers.test_denoising import ALONE, generate_with
from tests.workers.test_elastic_rank import REQUEST, STEPS, TWO, started
from tests.workers.test_elastic_requests import LAYOUTS, REQUESTS, moves, pair, run, sent
from workers.errors import RequestCancelled
from workers.gang.elastic_rank import ElasticRank
from workers.gang.rank import Rank
from workers.messages import Kept, Part, Preview, PreviewOptions, StepEvent
from workers.model.denoising import Denoising
from workers.model.loader import load_model

SHAPES = (WarmupShape(width=64, height=48),)
"""As of `started`."""


@pytest.mark.parametrize("layout", ["ulysses 4", "tp 2 x ulysses 2"])
def test_a_request_with_an_adapter_moves_beside_one_without(
    ranks: RankPool, demo_models: dict[str, Path], ink: LoRA, layout: str
) -> None:
    folder, degrees, inked = demo_models["qwen-image"], LAYOUTS[layout], {"loras": (ink,)}
    requests = pair(REQUESTS["qwen-image"])
    requests["a"] = replace(requests["a"], loras=(("ink", 0.8),))
    found = ranks.run(degrees, run, degrees, folder, requests, moves(degrees), False, (ink,))
    plain = replace(requests["a"], loras=())
    alone = {each: ranks.run(ALONE, generate_with, folder, each, inked)[0] for each in (*requests.values(), plain)}
    assert error(alone[plain][0], alone[requests["a"]][0]) > 100 * BAR
    for name, request in requests.items():
        got = [made[name] for made in found if name in made]
        (drawn,) = [pictures for _, pictures in got if pictures]
        assert max(error(latents, alone[request][0]) for latents, _ in got) <= BAR
        assert differ(drawn, alone[request][1]) <= 1


PREVIEWED = replace(REQUEST, previews=PreviewOptions(count=4))
"""After steps 2, 4, 5 and 7 or so of nine."""


def previews_on_the_way(mesh: ParallelMesh, folder: Path) -> tuple[dict[int, bytes], torch.Tensor]:
    """Both ranks begin a request, the second ends it alone: what this rank has shown, and what its colors learned."""
    rank, shown, left = started(folder, 0), {}, Kept(0, b"", False)
    with rank._loaded.colors.warm_up():
        rank._warm_up()
    encoded = mesh.broadcast(rank.encode(PREVIEWED) if rank.rank == 0 else None)
    for report in rank.advance(Part(PREVIEWED, 1, 2, encoded)):
        if isinstance(report, StepEvent) and report.step == 3:
            rank.pause("a", 1)
        elif isinstance(report, Preview):
            shown[report.step] = report.data
        elif isinstance(report, Kept):
            left = report
    progress = mesh.broadcast(left.progress if rank.rank == 0 else None)
    if rank.rank == 1:
        reports = rank.advance(Part(PREVIEWED, 2, 1, encoded, progress))
        shown = {report.step: report.data for report in reports if isinstance(report, Preview)}
    assert rank._loaded.colors._gram is not None
    return shown, rank._loaded.colors._gram


def previews_of_one_rank(mesh: ParallelMesh, folder: Path) -> dict[int, bytes]:
    spec = model(folder).model_copy(update={"warmup_shapes": SHAPES})
    rank = Rank(0, spec)
    rank._use(load_model(spec, mesh))
    with rank._loaded.colors.warm_up():
        rank._warm_up()
    return {report.step: report.data for report in rank.generate(PREVIEWED) if isinstance(report, Preview)}


def decoded(data: bytes) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)


def test_previews_go_on_with_other_ranks_in_the_same_colors(ranks: RankPool, demo_models: dict[str, Path]) -> None:
    folder = demo_models["qwen-image"]
    (first, colors), (second, other_colors) = ranks.run(TWO, previews_on_the_way, folder)
    (expected,) = ranks.run(ALONE, previews_of_one_rank, folder)
    assert first and second and not first.keys() & second.keys()
    assert list(first) + list(second) == list(expected) == list(PreviewOptions(count=4).steps(STEPS))
    assert torch.equal(colors, other_colors)
    pictures = {step: decoded(data) for step, data in expected.items()}
    for step, data in (first | second).items():
        assert np.abs(decoded(data) - pictures[step]).max() <= 2  # a last bit, through JPEG
    steps = list(pictures)
    assert np.abs(pictures[steps[0]] - pictures[steps[-1]]).max() > 10


def cancelled(mesh: ParallelMesh, folder: Path) -> list[tuple[str, int]]:
    """One request on both ranks, then one on the first alone, each canceled after its second step: how it ended."""
    rank, ends = started(folder, 0), []
    for size in (2, 1):
        request = replace(REQUEST, request_id=f"on {size}")
        encoded = mesh.broadcast(rank.encode(request) if rank.rank == 0 else None)
        if rank.rank < size:
            steps = 0
            try:
                for report in rank.advance(Part(request, 1, size, encoded)):
                    steps += isinstance(report, StepEvent)
                    if steps == 2:
                        rank.cancel(request.request_id)  # reaches the first rank alone
            except RequestCancelled as error:
                ends.append((str(error), steps))
    return ends


def test_a_cancellation_stops_all_ranks_of_the_block_and_no_others(
    ranks: RankPool, demo_models: dict[str, Path]
) -> None:
    first, second = ranks.run(TWO, cancelled, demo_models["qwen-image"])
    assert first == [("request on 2 was canceled", 2), ("request on 1 was canceled", 2)]
    assert second == [("request on 2 was canceled", 0)]


def drawn_by_compiled(mesh: ParallelMesh, folder: Path, ink: LoRA, layouts: int) -> list[int]:
    """Graphs after a warm-up of so many layouts, after an adapter has come, and after requests that have moved."""
    torch._dynamo.reset()
    counters.clear()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager")):
        rank = started(folder, 0, compile=True)
    warmed = ElasticRank._warm_up_requests

    def some(self: ElasticRank, *loras: Any) -> Any:
        found = list(warmed(self, *loras))
        chosen = list(dict.fromkeys(layout for layout, _ in found))[:layouts]
        return [(layout, request) for layout, request in found if layout in chosen]

    with mock.patch.object(ElasticRank, "_warm_up_requests", some):
        rank._warm_up()
        found = [counters["stats"]["unique_graphs"]]
        rank.set_loras((ink,))
    found.append(counters["stats"]["unique_graphs"])
    for request in (REQUEST, replace(REQUEST, prompt="another length of the prompt", loras=(("ink", 0.5),))):
        moved(rank, mesh, replace(request, num_inference_steps=5))
        found.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    return found


def moved(rank: ElasticRank, mesh: ParallelMesh, request: Any) -> None:
    """A step on both ranks, one on each alone, another on both; it is not drawn to its end."""
    encoded = mesh.broadcast(rank.encode(request) if rank.rank == 0 else None)
    progress = b""
    for number, (first, size) in enumerate([(0, 2), (0, 1), (1, 1), (0, 2)], 1):
        left = b""
        if first <= rank.rank < first + size:
            rank.pause(request.request_id, number)
            for report in rank.advance(Part(request, number, size, encoded, progress)):
                left = report.progress if isinstance(report, Kept) else left
        progress = sent(left, first)


@pytest.mark.soak
def test_a_move_compiles_nothing(ranks: RankPool, demo_models: dict[str, Path], ink: LoRA) -> None:
    for started_with, adapted, *after in ranks.run(TWO, drawn_by_compiled, demo_models["qwen-image"], ink, 2):
        assert 0 < started_with < adapted
        assert after == [adapted] * 2


@pytest.mark.soak
def test_a_layout_that_was_not_warmed_up_would_compile(
    ranks: RankPool, demo_models: dict[str, Path], ink: LoRA
) -> None:
    for _, adapted, plain, inked in ranks.run(TWO, drawn_by_compiled, demo_models["qwen-image"], ink, 1):
        assert adapted < plain < inked


def layouts_of_adapters(mesh: ParallelMesh, folder: Path, ink: LoRA) -> list[str]:
    """Where a rank whose blocks are compiled would compile them for an adapter."""
    rank, found = started(folder, 0, loras=(ink,)), []
    rank.model = rank.model.model_copy(update={"compile": True})

    def denoised(denoising: Denoising) -> Iterator[Any]:
        assert denoising.request.loras == (("ink", 1.0),)
        found.append(str(rank._loaded.mesh.degrees))
        yield from ()

    with mock.patch.object(rank, "_denoise", denoised):
        rank._warm_up_adapters((ink,))
    return found


def test_adapters_are_warmed_up_in_every_layout(ranks: RankPool, demo_models: dict[str, Path], ink: LoRA) -> None:
    for found in ranks.run(TWO, layouts_of_adapters, demo_models["qwen-image"], ink):
        assert set(found) == {"ulysses_degree=2", "1 rank"}


def guided_and_not(mesh: ParallelMesh, folder: Path) -> list[tuple[str, bool]]:
    """The layouts of the warm-up where groups of ranks divide branches, and whether the request there is guided."""
    degrees = ParallelDegrees(ulysses_degree=1, cfg_parallel_size=2)
    made = ParallelMesh.create(degrees, device_type="cpu", timeout_s=60, smaller=smaller_layouts(degrees, 1))
    spec = model(folder, **asdict(degrees)).model_copy(update={"elastic": Elastic(), "warmup_shapes": SHAPES})
    rank = ElasticRank(mesh.axis("gang").rank, spec)
    rank._use(load_model(spec, made))
    return [(str(layout), request.guidance_scale > 1) for layout, request in rank._warm_up_requests()]


def test_the_layouts_of_requests_without_guidance_are_warmed_up_too(
    ranks: RankPool, demo_models: dict[str, Path]
) -> None:
    for found in ranks.run(TWO, guided_and_not, demo_models["qwen-image"]):
        assert {guided for layout, guided in found if layout == "cfg_parallel_size=2"} == {True}
        assert {guided for layout, guided in found if layout == "ulysses_degree=2"} == {False}
        assert "1 rank" in dict(found)
