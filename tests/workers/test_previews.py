"""Previews: predicted clean latents, their colors by a fitted map or by the VAE, and the files of them."""

import io
import threading
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sp_core.attention.region_attention import attention_kept_local
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.benchmarks import previews as benchmark
from tests.support.deployments import model
from tests.support.fake_cuda.request import REQUESTS
from tests.workers.test_denoising import ALONE, begun
from tests.workers.test_schedulers import FLOW
from tests.workers.test_steps_ahead import started
from workers.errors import InvalidParameter, RequestCancelled
from workers.gang import preview_files
from workers.gang.preview_files import PreviewFiles
from workers.gang.rank import Rank
from workers.messages import Drawn, GenerationRequest, Preview, PreviewDecoder, PreviewOptions
from workers.model.latent_colors import LatentColors
from workers.model.loader import LoadedModel, load_model
from workers.model.previews import cells_of, check_predicts_clean, clean, example

Array = np.ndarray[Any, Any]

SIX = GenerationRequest("a", "demo", "a cup", 96, 64, 6, seed=3, previews=PreviewOptions(count=3))

LINEAR, VAE = PreviewOptions(count=3), PreviewOptions(count=3, decoder="vae")


def loaded_alone(folder: Path) -> LoadedModel:
    return load_model(model(folder), ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60))


def warmed(loaded: LoadedModel, request: GenerationRequest) -> LoadedModel:
    """After this request, without previews, as its warm-up."""
    denoising = begun(loaded, replace(request, previews=None))
    with loaded.colors.warm_up():
        while not denoising.done:
            denoising.step()
        denoising.join_pictures()
        denoising.finish()
    return loaded


def painted(loaded: LoadedModel, request: GenerationRequest) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The cells that the linear previews show, and those of the latents at the end."""
    cells, paint = [], loaded.colors.paint

    def watched(given: torch.Tensor) -> torch.Tensor:
        cells.append(given)
        return paint(given)

    with mock.patch.object(loaded.colors, "paint", watched):
        _, latents, _ = seen(loaded, request)
    return cells, cells_of(latents, request)


def seen(loaded: LoadedModel, request: GenerationRequest) -> tuple[dict[int, Array], torch.Tensor, list[Any]]:
    """The previews by step, the latents at the end, and what was drawn."""
    denoising, found = begun(loaded, request), {}
    for end in denoising.steps(ahead=1):
        if preview := denoising.preview(end.step):
            assert preview[0] == len(found)
            found[end.step] = np.asarray(preview[1], dtype=np.int16)
    denoising.join_pictures()
    return found, denoising.latents, denoising.finish()


@pytest.mark.parametrize(
    ("options", "total", "steps"),
    [
        (PreviewOptions(count=3), 20, (5, 10, 15)),
        (PreviewOptions(count=3), 4, (1, 2, 3)),
        (PreviewOptions(count=3), 2, (1,)),
        (PreviewOptions(count=2), 1, ()),
        (PreviewOptions(), 20, ()),
        (PreviewOptions(every=5), 20, (5, 10, 15)),
        (PreviewOptions(every=1), 8, (3, 6)),
        (PreviewOptions(every=4, decoder="vae"), 12, (4, 8)),
        (PreviewOptions(every=1, decoder="vae"), 100, (25, 50, 75)),
    ],
)
def test_previews_are_spread_over_the_steps(options: PreviewOptions, total: int, steps: tuple[int, ...]) -> None:
    assert options.steps(total) == steps


FLOWS: list[tuple[str, dict[str, Any]]] = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchLCMScheduler", {"shift": 3.0}),
    ("FlowMapEulerDiscreteScheduler", {"shift": 3.0}),
    ("UniPCMultistepScheduler", FLOW),
    ("DPMSolverMultistepScheduler", FLOW),
    ("DPMSolverSinglestepScheduler", FLOW),
    ("DEISMultistepScheduler", FLOW),
]


@pytest.mark.parametrize(("kind", "config"), FLOWS, ids=[kind for kind, _ in FLOWS])
def test_the_clean_latents_of_every_scheduler(kind: str, config: dict[str, Any]) -> None:
    """A model that knows the picture, and answers the flow to it at the timestep: the prediction is the picture."""
    scheduler = getattr(diffusers, kind)(**config)
    check_predicts_clean(scheduler, SIX)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(1)
    picture, sample = (torch.randn(1, 4, 6, 8, generator=generator) for _ in range(2))
    others = []
    for step, timestep in enumerate(scheduler.timesteps, 1):
        flow = (sample - picture) / (timestep / 1000)
        torch.testing.assert_close(clean(sample, flow, scheduler, step), picture, atol=0.02, rtol=0)
        others.append(float((clean(sample, flow, scheduler, step + 1) - picture).abs().max()))
        sample = scheduler.step(flow, timestep, sample, return_dict=False)[0]
    assert max(others) > 0.5  # the sigma of another step


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("EulerDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    ],
)
def test_what_predicts_no_flow_is_refused_by_name(kind: str, config: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=f"'demo' has no previews: its {kind}"):
        check_predicts_clean(getattr(diffusers, kind)(**config), SIX)


@pytest.mark.parametrize("family", REQUESTS)
def test_cells_are_what_the_vae_decodes(demo_models: dict[str, Path], family: str) -> None:
    """Channel by channel, but for a scale and a shift."""
    loaded = loaded_alone(demo_models[family])
    decode, taken = loaded.pipeline.vae.decode, []

    def decoded(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        taken.append(latents)
        return decode(latents, *args, **kwargs)

    with mock.patch.object(loaded.pipeline.vae, "decode", decoded):
        _, latents, _ = seen(loaded, replace(REQUESTS[family], previews=None))
    (given,) = taken
    cells = cells_of(latents, REQUESTS[family]).flatten(1)
    expected = given[0, :, given.shape[2] // 2] if given.ndim == 5 else given[0]
    assert cells.std() > 0
    for channel, reference in zip(cells, expected.flatten(1), strict=True):
        assert float(torch.corrcoef(torch.stack((channel, reference)))[0, 1]) > 0.99999


def test_a_linear_vae_is_found_again() -> None:
    """By least squares from one picture; another picture has its colors, up to the rounding of pixels."""
    generator = torch.Generator().manual_seed(2)
    factors = torch.rand(5, 3, generator=generator) / 5
    cells, others = (torch.rand(4, 12, 16, generator=generator) for _ in range(2))

    def decoded(cells: torch.Tensor) -> Image.Image:
        colors = torch.einsum("chw,cr->hwr", cells, factors[:4]) + factors[4]
        small = Image.fromarray((colors * 255).round().to(torch.uint8).numpy())
        return small.resize((8 * small.width, 8 * small.height), Image.Resampling.NEAREST)

    colors = LatentColors()
    assert not colors.fitted
    colors.learn(cells, decoded(cells))
    reference = np.asarray(decoded(others), dtype=np.int16)[::8, ::8]
    assert np.abs(colors.paint(others).numpy() - reference).max() <= 2
    wrong = LatentColors()
    wrong.learn(cells.flip(0), decoded(cells))
    assert np.abs(wrong.paint(others).numpy() - reference).max() > 20


def test_fewer_cells_than_channels_are_no_mistake() -> None:
    cells = torch.rand(16, 2, 2)
    picture = Image.fromarray(np.full((16, 16, 3), 77, dtype=np.uint8))
    colors = LatentColors()
    colors.learn(cells, picture)
    assert np.abs(colors.paint(cells).numpy().astype(int) - 77).max() <= 1


@pytest.mark.parametrize("family", REQUESTS)
def test_the_fitted_map_is_nearer_to_the_vae_than_others(demo_models: dict[str, Path], family: str) -> None:
    request = replace(REQUESTS[family], width=128, height=96, previews=None)
    loaded = warmed(loaded_alone(demo_models[family]), request)
    _, latents, made = seen(loaded, request)
    cells, picture = example(latents, made[0], request)
    _, height, width = cells.shape
    reference = np.asarray(picture.resize((width, height), Image.Resampling.BOX), dtype=np.float64)

    def missed(colors: LatentColors) -> float:
        return float(((colors.paint(cells).numpy() - reference) ** 2).mean())

    wrong = []
    for order in (cells.flip(0), cells.transpose(1, 2).reshape(cells.shape)):
        colors = LatentColors()
        colors.learn(order, picture)  # the channels, or the cells, in another order
        wrong.append(missed(colors))
    assert missed(loaded.colors) < 0.99 * min(wrong)


@pytest.mark.parametrize("family", REQUESTS)
def test_previews_come_nearer_to_the_picture(demo_models: dict[str, Path], family: str) -> None:
    request = replace(REQUESTS[family], num_inference_steps=8, previews=LINEAR)
    loaded = warmed(loaded_alone(demo_models[family]), request)
    found, latents, _ = seen(loaded, request)
    assert list(found) == [2, 4, 6]
    cells, end = painted(loaded, request)
    first, *_, last = (float((each - end).abs().mean()) for each in cells)
    assert last < 0.7 * first
    picture = loaded.colors.paint(end).numpy()
    first, *_, last = (np.abs(preview - picture).mean() for preview in found.values())
    assert last < first
    plain, untouched, _ = seen(loaded, replace(request, previews=None))
    assert plain == {}
    assert torch.equal(latents, untouched)


@pytest.mark.parametrize("family", REQUESTS)
def test_what_is_predicted_in_the_last_step_is_the_picture(demo_models: dict[str, Path], family: str) -> None:
    """Nothing is left to remove after it. The step before it predicts something else."""
    request = replace(REQUESTS[family], previews=LINEAR)
    loaded = warmed(loaded_alone(demo_models[family]), request)
    with mock.patch.object(PreviewOptions, "steps", lambda _, total: (total - 1, total)):
        (before, last), end = painted(loaded, request)
    assert error(last, end) <= BAR
    assert error(before, end) > 100 * BAR


@pytest.mark.parametrize("family", sorted(set(REQUESTS) - {"wan"}))
def test_previews_by_the_vae_are_pictures(demo_models: dict[str, Path], family: str) -> None:
    """They need no map, come nearer to the picture, and leave it as it is."""
    request = replace(REQUESTS[family], num_inference_steps=8, previews=VAE)
    loaded = loaded_alone(demo_models[family])
    found, _, (made,) = seen(loaded, request)
    picture = np.asarray(made, dtype=np.int16)
    assert all(preview.shape == picture.shape for preview in found.values())
    first, *_, last = (np.abs(preview - picture).mean() for preview in found.values())
    assert last < 0.8 * first
    _, _, (plain,) = seen(loaded, replace(request, previews=None))
    assert np.array_equal(picture, np.asarray(plain, dtype=np.int16))


def test_the_preview_of_a_video_is_its_middle_frame_as_a_picture(demo_models: dict[str, Path]) -> None:
    request = replace(REQUESTS["wan"], num_frames=9, previews=VAE)
    found, latents, (made,) = seen(loaded_alone(demo_models["wan"]), request)
    assert latents.shape[2] == 3
    assert {preview.shape for preview in found.values()} == {(request.height, request.width, 3)}
    _, shown = example(latents, made, request)
    mean = np.mean([np.asarray(frame, dtype=float) for frame in made[1:5]], axis=0)
    assert np.abs(np.asarray(shown) - mean).max() <= 2  # each of three means is rounded


def previewed(mesh: ParallelMesh, folder: Path, decoder: PreviewDecoder, local: bool) -> tuple[dict[int, Array], Any]:
    """The previews of a request, and the cells that they show if they are linear. Those are warmed up before."""
    spec = model(folder, **asdict(mesh.degrees)).model_copy(update={"vae": "all", "vae_tiling_above": 48 * 48})
    loaded, request = load_model(spec, mesh), replace(SIX, previews=PreviewOptions(count=3, decoder=decoder))
    if decoder == "linear":
        warmed(loaded, request)
    with attention_kept_local() if local else nullcontext():
        return seen(loaded, request)[0], painted(loaded, request)[0]


@pytest.mark.parametrize("decoder", ["linear", "vae"])
def test_two_ranks_have_the_previews_of_one(ranks: RankPool, demo_model: Path, decoder: PreviewDecoder) -> None:
    """On rank 0, also where all ranks share the tiles of the VAE."""
    ((reference, cells),) = ranks.run(ALONE, previewed, demo_model, decoder, False)
    assert list(reference) == [2, 3, 4]
    assert len(cells) == 3 * (decoder == "linear")
    for degrees in (ParallelDegrees(ulysses_degree=2), ParallelDegrees(ring_degree=2)):
        (found, shown), other = ranks.run(degrees, previewed, demo_model, decoder, False)
        assert other == ({}, [])
        assert all(error(got, expected) <= BAR for got, expected in zip(shown, cells, strict=True))
        assert max(np.abs(found[step] - reference[step]).max() for step in reference) <= 1
    (found, shown), _ = ranks.run(degrees, previewed, demo_model, decoder, True)
    assert all(error(got, expected) > 100 * BAR for got, expected in zip(shown, cells, strict=True))
    assert max(np.abs(found[step] - reference[step]).max() for step in reference) > 10


def reports(rank: Rank, request: GenerationRequest) -> tuple[list[Preview], list[int], tuple[bytes, ...]]:
    """Its previews, the numbers of its steps before each, and its files."""
    previews, steps, places = [], 0, []
    files: tuple[bytes, ...] = ()
    for report in rank.generate(request):
        if isinstance(report, Preview):
            previews.append(report)
            places.append(steps)
        elif isinstance(report, Drawn):
            files = rank.answer(report.request_id).outputs
        else:
            steps += 1
    return previews, places, files


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_rank_reports_jpegs_and_the_same_picture(demo_model: Path, ahead: int) -> None:
    rank = started(ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60), demo_model, ahead)
    with rank._loaded.colors.warm_up():
        rank._warm_up()
    request = replace(SIX, report_steps=True)
    previews, places, files = reports(rank, request)
    assert [(preview.index, preview.step) for preview in previews] == [(0, 2), (1, 3), (2, 4)]
    assert all(place >= preview.step for place, preview in zip(places, previews, strict=True))
    for preview in previews:
        picture = Image.open(io.BytesIO(preview.data))
        assert (picture.format, picture.size) == ("JPEG", (96, 64))
    assert files
    assert reports(rank, replace(request, previews=None)) == ([], [], files)
    small, _, again = reports(rank, replace(request, previews=PreviewOptions(every=3, max_edge=48)))
    assert [preview.step for preview in small] == [3]
    assert Image.open(io.BytesIO(small[0].data)).size == (48, 32)
    assert again == files
    assert [preview.data for preview in reports(rank, request)[0]] == [preview.data for preview in previews]


def test_nothing_is_left_of_a_request_that_is_canceled(demo_model: Path) -> None:
    rank = started(ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60), demo_model, 0)
    request = replace(SIX, num_inference_steps=12)
    with pytest.raises(RequestCancelled):
        for report in rank.generate(request):
            assert isinstance(report, Preview)
            rank.cancel(request.request_id)
    previews, _, _ = reports(rank, replace(request, request_id="next", previews=None))
    assert previews == []
    assert len(rank._previews._coming) == 0


def test_a_preview_that_fails_costs_a_warning(demo_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = loaded_alone(demo_model)
    with mock.patch.object(loaded.colors, "learn", side_effect=torch.OutOfMemoryError("no room\nfor it")):
        denoising = begun(loaded, SIX)
        for end in denoising.steps(ahead=0):
            assert denoising.preview(end.step) is None
        assert denoising.warnings == ("previews: none from step 2 on; OutOfMemoryError: no room",)
        assert len(denoising.finish()) == 1
    assert caplog.text.count("request a has no more previews: OutOfMemoryError: no room") == 1


def test_the_oldest_that_wait_are_left_out() -> None:
    began, go_on, encode = threading.Event(), threading.Event(), preview_files._encoded

    def slow(*args: Any) -> Preview:
        began.set()
        assert go_on.wait(60)
        return encode(*args)

    files, pixels = PreviewFiles(), torch.zeros(8, 12, 3, dtype=torch.uint8)
    files.begin(SIX)
    with mock.patch.object(preview_files, "_encoded", slow):
        files.offer(0, 1, pixels)
        assert began.wait(60)
        for index in range(1, 7):
            files.offer(index, index + 1, pixels)
        assert list(files.finished()) == []
        go_on.set()
        assert [preview.index for preview in files.finished(wait=True)] == [0, 4, 5, 6]
    files.begin(SIX)
    files.offer(0, 1, pixels[..., :2])  # two colors are no picture
    files.offer(1, 2, pixels)
    assert [preview.index for preview in files.finished(wait=True)] == [1]


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main("--repeats 1 --steps 4 --step-ms 1 --size 64".split())
    rows = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| waits", "| comp"))
    ]
    assert len(rows) == 6
    assert all(float(cell) > 0 for row in rows for cell in row[2:4])
