"""Requests that begin with a picture make what diffusers' classic pipelines make, and the same on every layout."""

import asyncio
import inspect
import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ModularPipeline, UniPCMultistepScheduler
from PIL import Image

from deploy.families.lookup import families
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.deployments import model
from tests.workers.test_denoising import ALONE, Generated, begun, check, generate, generate_with, pixels
from workers.errors import InvalidParameter
from workers.gang import rank_group
from workers.messages import GenerationRequest, MediaInput
from workers.model.adapters.lookup import find_adapter
from workers.model.denoising import Denoising
from workers.model.loader import load_model
from workers.model.previews import clean


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def painted(width: int, height: int) -> Image.Image:
    """A picture in which every place has its own color, and neighbors differ."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (7 * x + 11 * y) % 256], -1).astype(np.uint8))


PHOTO = painted(100, 90)  # of another shape than what is drawn
MASK = Image.new("L", (100, 90), 0)
MASK.paste(255, (30, 20, 80, 70))

IMAGE, WHERE = MediaInput("image", png(PHOTO)), MediaInput("mask", png(MASK))

REQUEST = GenerationRequest(
    "a", "demo", "a cup of coffee", 80, 112, 5, seed=3, n=2, guidance_scale=2.0, inputs=(IMAGE,), strength=0.7
)
"""Four of five steps."""

REQUESTS: dict[str, tuple[str, GenerationRequest, dict[str, Any]]] = {
    "qwen-image": (
        "qwen-image",
        replace(REQUEST, negative_prompt="blurry"),
        {"true_cfg_scale": 2.0, "negative_prompt": "blurry"},
    ),
    "qwen-image, unguided": ("qwen-image", REQUEST, {}),
    "qwen-image, inpaint": (
        "qwen-image",
        replace(REQUEST, negative_prompt="blurry", inputs=(IMAGE, WHERE)),
        {"true_cfg_scale": 2.0, "negative_prompt": "blurry", "mask_image": MASK},
    ),
    "flux": ("flux", REQUEST, {"guidance_scale": 2.0}),
    "z-image": ("z-image", REQUEST, {"guidance_scale": 2.0}),
    "z-image, unguided": ("z-image", replace(REQUEST, guidance_scale=0.0), {"guidance_scale": 0.0}),
}

LAYOUTS = {
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
    "ring 2": ParallelDegrees(ring_degree=2),
    "cfg 2": ParallelDegrees(cfg_parallel_size=2),
}


def alone(folder: Path, request: GenerationRequest, **options: Any) -> Generated:
    return generate(ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60), folder, request, **options)


def classic(folder: Path, request: GenerationRequest, told: dict[str, Any], output_type: str = "pil") -> list[Any]:
    """The pictures or latents of the classic pipeline, each asked for alone."""
    names = find_adapter(folder).family.with_pictures
    kind = getattr(diffusers, names["inpaint" if "mask_image" in told else "image-to-image"])
    pipeline = kind.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    size = {"width": request.width, "height": request.height, "num_inference_steps": request.num_inference_steps}
    photo = PHOTO.resize((request.width, request.height), Image.Resampling.LANCZOS)  # that of Z-Image does not do it
    strength = {} if request.strength is None else {"strength": request.strength}
    made = [
        pipeline(
            request.prompt, image=photo, generator=torch.Generator().manual_seed(seed), output_type=output_type,
            **size, **strength, **told,
        ).images
        for seed in request.all_seeds
    ]  # fmt: skip
    return made if output_type == "latent" else [pixels(picture) for (picture,) in made]


def apart(first: list[Any], second: list[Any]) -> int:
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", REQUESTS)
def test_one_rank_is_the_classic_pipeline(demo_models: dict[str, Path], name: str) -> None:
    family, request, told = REQUESTS[name]
    latents, made = alone(demo_models[family], request)
    assert apart(made, classic(demo_models[family], request, told)) <= 1
    other = MediaInput("image", png(PHOTO.rotate(180)))
    elsewhere, drawn = alone(demo_models[family], replace(request, inputs=(other, *request.inputs[1:])))
    assert error(elsewhere, latents) > 100 * BAR  # else the picture would not matter
    assert apart(made, drawn) > 5


def test_the_latents_are_those_of_the_classic_pipeline(demo_model: Path) -> None:
    _, request, told = REQUESTS["qwen-image, inpaint"]
    latents, _ = alone(demo_model, request)
    mixed = latents.clone()
    mixed[1] = latents[0]
    found = torch.cat(classic(demo_model, request, told, output_type="latent"))
    assert error(latents, found) <= BAR
    assert error(mixed, found) > 100 * BAR


CASES = [(name, layout) for name in REQUESTS if "unguided" not in name for layout in ("ulysses 2", "ring 2")]
CASES += [("qwen-image, inpaint", "cfg 2")]
CASES += [("qwen-image, unguided", "cfg 2")]  # the groups divide the pictures


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_layout_makes_the_same(ranks: RankPool, demo_models: dict[str, Path], name: str, layout: str) -> None:
    family, request, _ = REQUESTS[name]
    ((latents, made),) = ranks.run(ALONE, generate, demo_models[family], request)
    check(ranks.run(LAYOUTS[layout], generate, demo_models[family], request), latents, made)


@pytest.mark.parametrize("name", ["qwen-image, inpaint", "flux"])
def test_local_attention_would_be_seen(ranks: RankPool, demo_models: dict[str, Path], name: str) -> None:
    family, request, _ = REQUESTS[name]
    ((latents, _),) = ranks.run(ALONE, generate, demo_models[family], request)
    got, _ = ranks.run(LAYOUTS["ulysses 2"], generate, demo_models[family], request, True)[0]
    assert error(got, latents) > 100 * BAR


@pytest.mark.parametrize(
    "options", [{"text_encoder": "replicate"}, {"vae": "rank0"}, {"text_encoder": "replicate", "vae": "rank0"}]
)
def test_only_the_first_rank_reads_pictures(ranks: RankPool, demo_model: Path, options: dict[str, str]) -> None:
    """The others get none, whether or not they have encoders and the VAE."""
    _, request, _ = REQUESTS["qwen-image, inpaint"]
    ((latents, made),) = ranks.run(ALONE, generate, demo_model, request)
    check(ranks.run(LAYOUTS["ulysses 2"], first_reads, demo_model, request, options), latents, made)


def first_reads(mesh: ParallelMesh, folder: Path, request: GenerationRequest, options: dict[str, Any]) -> Generated:
    mine = request if mesh.axis("gang").rank == 0 else request.without_data()
    assert all(each.data for each in mine.inputs) == (mesh.axis("gang").rank == 0)
    return generate_with(mesh, folder, mine, options)


@pytest.mark.parametrize("strength", [None, 0.3, 1.0])
def test_the_strength_is_that_of_the_classic_pipeline(demo_model: Path, strength: float | None) -> None:
    request = replace(REQUEST, n=1, strength=strength)
    _, made = alone(demo_model, request)
    assert apart(made, classic(demo_model, request, {})) <= 1


def test_what_the_mask_leaves_is_the_image_again(demo_model: Path) -> None:
    """As the VAE makes it: the black part of the mask has the latents of the image alone."""
    _, request, _ = REQUESTS["qwen-image, inpaint"]
    request = replace(request, n=1)
    latents, _ = alone(demo_model, request)
    nothing, _ = alone(demo_model, replace(request, inputs=(IMAGE, MediaInput("mask", png(Image.new("L", (9, 9)))))))
    tokens = (latents - nothing).abs().amax(-1)[0].reshape(7, 5)
    assert tokens[0].max() == 0 < tokens[3, 2]  # 30 to 80 of 100 is the middle


def test_a_picture_of_a_seed_is_the_same_among_several(demo_model: Path) -> None:
    latents, _ = alone(demo_model, REQUEST)
    single, _ = alone(demo_model, replace(REQUEST, n=1, seed=REQUEST.seed + 1))
    assert error(latents[1:], single) <= BAR


def test_a_large_picture_is_encoded_in_tiles(demo_model: Path) -> None:
    inputs = (MediaInput("image", png(painted(320, 288))),)
    request = GenerationRequest("a", "demo", "a cup", 320, 288, 4, seed=3, inputs=inputs, strength=0.25)
    whole, _ = alone(demo_model, request, vae_tiling_above=320 * 288)
    tiled, _ = alone(demo_model, request, vae_tiling_above=320 * 288 - 1)
    assert error(tiled, whole) > BAR


def test_steps_and_previews_count_what_is_done(demo_model: Path) -> None:
    loaded = load_model(model(demo_model), ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60))
    denoising = begun(loaded, replace(REQUEST, n=1, strength=0.5, num_inference_steps=6))
    assert denoising.total_steps == 3
    scheduler = denoising._pipeline.scheduler
    one = torch.ones(1)
    assert clean(one, one, scheduler, 1) == 1 - scheduler.sigmas[3] != 1 - scheduler.sigmas[0]


def test_the_bytes_of_pictures_travel_to_the_first_rank_alone() -> None:
    sent: dict[str, GenerationRequest] = {}

    async def made(calls: Any, *_: Any) -> Any:
        sent.update({call.rank: call.arguments[0] for call in calls})
        return
        yield

    async def run() -> None:
        group: Any = SimpleNamespace(_ranks=["0", "1", "2"], _run=made)
        assert [report async for report in rank_group.RankGroup.run(group, REQUEST)] == []

    asyncio.run(run())
    assert sent["0"] == REQUEST
    for other in (sent["1"], sent["2"]):
        assert other == replace(REQUEST, inputs=(MediaInput("image", b""),))


REFUSALS = {
    "mask": ("flux", {"inputs": (IMAGE, WHERE)}, "'demo' is not for inpaint; it is for text-to-image, image-to-image"),
    "video": (
        "wan", {"num_frames": 5, "output_format": "mp4", "width": 64, "height": 48},
        "'demo' is not for image-to-video; it is for text-to-video",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_model_without_the_task_refuses_it_by_name(demo_models: dict[str, Path], name: str) -> None:
    family, changes, said = REFUSALS[name]
    loaded = load_model(model(demo_models[family]), ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60))
    with pytest.raises(InvalidParameter, match=said):
        Denoising(loaded, replace(REQUEST, **changes))


def test_a_scheduler_that_adds_no_noise_is_refused(demo_model: Path) -> None:
    loaded = load_model(model(demo_model), ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60))
    loaded.pipeline.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(InvalidParameter, match="begins with noise alone: its UniPCMultistepScheduler"):
        Denoising(loaded, REQUEST)


@pytest.mark.parametrize("family", ["qwen-image", "flux", "z-image"])
def test_all_defaults_are_those_of_the_classic_pipeline(demo_models: dict[str, Path], family: str) -> None:
    adapter = find_adapter(demo_models[family])
    blocks = ModularPipeline.from_pretrained(str(demo_models[family]), local_files_only=True).blocks
    defaults = adapter.defaults(REQUEST, blocks.get_execution_blocks(prompt="a", image=True).inputs)
    kind = getattr(diffusers, families()[family.replace("-", "_")].with_pictures["image-to-image"])
    told = inspect.signature(kind.__call__).parameters
    assert defaults["strength"] == told["strength"].default == 0.6
    assert {name: defaults[name] for name in defaults.keys() & told} == {
        name: told[name].default for name in defaults.keys() & told
    }
