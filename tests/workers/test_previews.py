"""Previews: predicted clean latents, their colors by a fitted map or by the VAE, and the files of them."""

import io
import threading
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
from tests.support.deployments import model
from tests.support.fake_cuda.request import REQUESTS
from tests.workers.test_denoising import ALONE, begun
from tests.workers.test_schedulers import FLOW
from tests.workers.test_steps_ahead import started
from workers.errors import InvalidParameter, RequestCancelled
from workers.gang import preview_files
from workers.gang.preview_files import PreviewFiles
from workers.messages import Drawn, GenerationRequest, Preview, PreviewOptions
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
    """A model that knows the picture is told the timestep, and answers the flow to it: the prediction is the picture."""
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
    assert missed(loaded.colors) < 0.97 * min(wrong)


@pytest.mark.parametrize("family", REQUESTS)
def test_previews_come_nearer_to_the_picture(demo_models: dict[str, Path], family: str) -> None:
    request = replace(REQUESTS[family], num_inference_steps=8, previews=LINEAR)
    loaded = warmed(loaded_alone(demo_models[family]), request)
    found, latents, _ = seen(loaded, request)
    assert list(found) == [2, 4, 6]
    end = loaded.colors.paint(cells_of(latents, request)).numpy()
    first, *_, last = (np.abs(preview - end).mean() for preview in found.values())
    assert last < 0.8 * first
    plain, untouched, _ = seen(loaded, replace(request, previews=None))
    assert plain == {}
    assert torch.equal(latents, untouched)


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
    assert np.abs(np.asarray(shown) - mean).max() <= 0.5


def drawn(mesh: ParallelMesh, folder: Path, options: PreviewOptions, local: bool) -> tuple[dict[int, Array], Any, Any]:
    """The previews of a request, after a warm-up if they are linear, its latents and pictures."""
    spec = model(folder, **asdict(mesh.degrees)).model_copy(update={"vae": "all", "vae_tiling_above": 48 * 48})
    loaded = load_model(spec, mesh)
    if options.decoder == "linear":
        warmed(loaded, SIX)
    with mock.patch.object(LatentColors, "learn", side_effect=AssertionError("it is warm")):
        if not local:
            return seen(loaded, replace(SIX, previews=options))
        with attention_kept_local():
            return seen(loaded, replace(SIX, previews=options))


@pytest.mark.parametrize("options", [LINEAR, replace(VAE)], ids=["linear", "vae"])
def test_two_ranks_have_the_previews_of_one(ranks: RankPool, demo_model: Path, options: PreviewOptions) -> None:
    """On rank 0, also where all ranks share the tiles of the VAE."""
    ((reference, latents, _),) = ranks.run(ALONE, drawn, demo_model, options, False)
    assert list(reference) == [2, 3, 4] or len(reference) == 3
    for degrees in (ParallelDegrees(ulysses_degree=2), ParallelDegrees(ring_degree=2)):
        (found, got, _), (nothing, _, _) = ranks.run(degrees, drawn, demo_model, options, False)
        assert nothing == {}
        assert error(got, latents) <= 1e-5
        assert list(found) == list(reference)
        assert max(np.abs(found[step] - reference[step]).max() for step in reference) <= 1
        (found, _, _), _ = ranks.run(degrees, drawn, demo_model, options, True)
        assert max(np.abs(found[step] - reference[step]).max() for step in reference) > 20
