"""Pipelines without an adapter that begin with pictures make what their classic call makes, on every layout."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from deploy.families.classic import classic_family, proved_pipelines
from deploy.families.lookup import CLASSIC, family_name, find_family
from deploy.model_sections import WarmupShape
from sp_core.attention.region_attention import attention_kept_local
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.models import lookup as plans
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.deployments import model
from tests.workers.picture_cases import CASES, CLIP_IN, CONTROL, FRAMES, LAST, OTHER, animated
from tests.workers.test_adapters import PICTURES, differ
from tests.workers.test_denoising import ALONE, Generated, begun, check, generate, pixels
from tests.workers.test_picture_inputs import IMAGE, PHOTO, WHERE, first_reads, png
from workers.demo_models.writer import write_demo_model
from workers.errors import InvalidParameter
from workers.gang.self_test import WrongAnswer, self_test
from workers.gang.warm_up import warm_up_requests
from workers.messages import GenerationRequest
from workers.model.classic_denoising import begin
from workers.model.loader import load_model
from workers.pipeline_proof import draw_by_seed
from workers.small_pictures import small_pictures

LAYOUTS = {"ulysses 2": ParallelDegrees(ulysses_degree=2), "ring 2": ParallelDegrees(ring_degree=2)}

QUICK = (
    "img2img", "inpaint", "kontext", "control", "image to video", "first and last", "clip to clip", "several",
    "z-image controlnet", "qwen edit of several",
)  # fmt: skip
"""One for each way in which a pipeline takes what a request begins with."""


def cases(*more: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in (*QUICK, *more) else pytest.mark.soak) for name in CASES]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo model of a case, written once, and only if a test asks for it."""
    written: dict[str, Path] = {}

    def find(name: str) -> Path:
        family, pipeline, _, _ = CASES[name]
        if pipeline not in written:
            written[pipeline] = tmp_path_factory.mktemp("pictures") / pipeline
            write_demo_model(written[pipeline], family, pipeline)
        return written[pipeline]

    return find


def made(mesh: ParallelMesh, folder: Path, request: GenerationRequest, local: bool = False) -> Generated:
    with small_pictures(folder):
        return generate(mesh, folder, request, local)


def asked(
    folder: Path,
    request: GenerationRequest,
    told: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    lora: Path | None = None,
    vae_in_fp32: bool = False,
) -> tuple[torch.Tensor, list[Any]]:
    """The latents after the last step of the classic call, and what it makes, each seed asked for alone."""
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if vae_in_fp32:
        pipeline.vae = type(pipeline.vae).from_pretrained(folder / "vae", local_files_only=True)
    if lora:
        pipeline.load_lora_weights(lora)
    latents: list[torch.Tensor] = []
    pictures: list[Any] = []
    for seed in request.all_seeds:
        draw_by_seed(pipeline.vae, seed)
        seen: list[torch.Tensor] = []

        def see(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any], seen: Any = seen) -> dict[str, Any]:
            seen[:] = [values["latents"].clone()]  # some calls write to them when they go on
            return {}

        with small_pictures(folder):
            found = pipeline(
                prompt=request.prompt,
                width=request.width,
                height=request.height,
                num_inference_steps=request.num_inference_steps,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=see,
                output_type="pil",
                **told,
            )[0]
        latents += seen
        pictures += [pixels(each) for each in found]
    return torch.cat(latents), pictures


def alone(folder: Path, request: GenerationRequest) -> Generated:
    return made(ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60), folder, request)


def elsewhere(request: GenerationRequest) -> GenerationRequest:
    """The same with its first picture turned."""
    first, *others = request.inputs
    turned = PHOTO.rotate(180) if first == IMAGE else OTHER.rotate(90)
    data = animated(FRAMES[::-1]) if first == CLIP_IN else png(turned)
    return replace(request, inputs=(replace(first, data=data), *others))


@pytest.mark.parametrize("name", cases("z-image img2img"))
def test_one_rank_is_the_classic_pipeline(folder_of: Callable[[str], Path], name: str) -> None:
    _, _, request, told = CASES[name]
    folder = folder_of(name)
    assert family_name(folder) == CLASSIC
    reference, expected = asked(folder, request, told)
    latents, pictures = alone(folder, request)
    assert error(latents, reference) <= BAR
    assert differ(pictures, expected) <= 1
    others, _ = alone(folder, elsewhere(request))
    assert error(others, latents) > 100 * BAR  # else the picture would not matter


def test_all_frames_of_a_clip_matter(folder_of: Callable[[str], Path]) -> None:
    """Also where the call takes a list of clips, of which a list of frames would be one each."""
    _, _, request, _ = CASES["a clip as a condition"]
    latents, _ = alone(folder_of("a clip as a condition"), request)
    data = animated([*FRAMES[:-1], OTHER.resize(FRAMES[-1].size)])
    others, _ = alone(folder_of("a clip as a condition"), replace(request, inputs=(replace(CLIP_IN, data=data),)))
    assert error(others, latents) > 100 * BAR


def test_tokens_are_drawn_for_each_picture_on_one_rank(ranks: RankPool, tmp_path: Path) -> None:
    write_demo_model(tmp_path / "demo", "glm_image", "GlmImagePipeline")
    request = replace(PICTURES, width=96, height=128, n=2)
    latents, pictures = alone(tmp_path / "demo", request)
    second, _ = alone(tmp_path / "demo", replace(request, n=1, seed=request.seed + 1))
    assert error(latents[1:], second) <= BAR
    check(ranks.run(LAYOUTS["ulysses 2"], made, tmp_path / "demo", request), latents, pictures)


@pytest.mark.parametrize("name", cases())
def test_every_layout_makes_the_same(ranks: RankPool, folder_of: Callable[[str], Path], name: str) -> None:
    _, _, request, _ = CASES[name]
    ((latents, pictures),) = ranks.run(ALONE, made, folder_of(name), request)
    for layout in LAYOUTS.values():
        check(ranks.run(layout, made, folder_of(name), request), latents, pictures)
    got, _ = ranks.run(LAYOUTS["ulysses 2"], made, folder_of(name), request, True)[0]
    assert error(got, latents) > 100 * BAR  # attention kept local


@pytest.mark.parametrize(
    "options", [{"text_encoder": "replicate"}, {"vae": "rank0"}, {"text_encoder": "replicate", "vae": "rank0"}], ids=str
)
def test_only_the_first_rank_reads_pictures(
    ranks: RankPool, folder_of: Callable[[str], Path], options: dict[str, str]
) -> None:
    """The others get none, whether or not they have encoders and the VAE."""
    _, _, request, _ = CASES["inpaint"]
    ((latents, pictures),) = ranks.run(ALONE, made, folder_of("inpaint"), request)
    check(ranks.run(LAYOUTS["ulysses 2"], first_reads, folder_of("inpaint"), request, options), latents, pictures)


def starts(mesh: ParallelMesh, folder: Path, local: bool) -> str:
    """What a gang does before it serves: it tests itself, and warms up."""
    shape = WarmupShape(width=64, height=64, num_frames=9 if find_family(folder).makes == "video" else 1)
    spec = model(folder, ulysses_degree=mesh.degrees.ulysses_degree).model_copy(update={"warmup_shapes": (shape,)})
    loaded = load_model(spec, mesh)
    with small_pictures(folder), attention_kept_local() if local else nullcontext():
        try:
            self_test(loaded, lambda request: begun(loaded, request))
        except WrongAnswer as wrong:
            return str(wrong)
        for request in warm_up_requests(spec):
            denoising = begun(loaded, request)
            while not denoising.done:
                denoising.step()
            denoising.finish()
    return ""


STARTS = ("inpaint", "first and last")


@pytest.mark.parametrize(
    "name", [*STARTS, *[pytest.param(n, marks=pytest.mark.soak) for n in CASES if n not in STARTS]]
)
def test_a_gang_starts_with_what_its_model_needs(ranks: RankPool, folder_of: Callable[[str], Path], name: str) -> None:
    assert ranks.run(LAYOUTS["ulysses 2"], starts, folder_of(name), False) == ["", ""]
    for said in ranks.run(LAYOUTS["ulysses 2"], starts, folder_of(name), True):
        assert "differs at transformer" in said


@pytest.mark.parametrize("name", ["image to video", pytest.param("several", marks=pytest.mark.soak)])
def test_a_rank_without_the_vae_knows_its_latents(ranks: RankPool, folder_of: Callable[[str], Path], name: str) -> None:
    """Their means and deviations are among the VAE's weights."""
    _, _, request, _ = CASES[name]
    ((latents, pictures),) = ranks.run(ALONE, made, folder_of(name), request)
    found = ranks.run(LAYOUTS["ulysses 2"], first_reads, folder_of(name), request, {"vae": "rank0"})
    check(found, latents, pictures)


def test_every_case_is_of_a_pipeline_that_begins_with_a_picture() -> None:
    """Those that are no case are proved in `tests/workers/test_support_matrix.py`."""
    named = {pipeline for _, pipeline, _, _ in CASES.values()}
    assert {each for each in proved_pipelines() if classic_family(each).with_pictures} >= named
    assert len({each for plan in plans.families() for each in plan.pipelines}) == len(proved_pipelines())


TASKS = {
    "StableDiffusion3Img2ImgPipeline": ("image-to-image",),
    "StableDiffusion3InpaintPipeline": ("inpaint",),
    "FluxFillPipeline": ("inpaint",),
    "FluxKontextPipeline": ("text-to-image", "edit"),
    "FluxControlPipeline": ("control",),
    "FluxControlImg2ImgPipeline": ("control",),
    "QwenImageEditPlusPipeline": ("edit",),
    "QwenImageEditInpaintPipeline": ("inpaint",),
    "LongCatImageEditPipeline": ("edit",),
    "JoyImageEditPipeline": ("edit",),
    "JoyImageEditPlusPipeline": ("text-to-image", "edit"),
    "BriaFibo2Pipeline": ("text-to-image", "edit", "inpaint"),
    "Flux2Pipeline": ("text-to-image", "edit"),
    "Flux2KleinPipeline": ("text-to-image", "edit"),
    "LTXImageToVideoPipeline": ("image-to-video",),
    "LTXConditionPipeline": ("text-to-video", "image-to-video", "video-to-video"),
    "WanImageToVideoPipeline": ("image-to-video", "first-last-frame-to-video"),
    "WanVideoToVideoPipeline": ("video-to-video",),
}


@pytest.mark.parametrize("pipeline", TASKS)
def test_the_tasks_are_those_of_the_signature(pipeline: str) -> None:
    assert classic_family(pipeline).tasks == TASKS[pipeline]


def test_what_guides_is_read_from_the_source() -> None:
    assert classic_family("QwenImageEditPipeline").guided_by_negative_prompt
    assert classic_family("QwenImageEditPipeline").guided_above == 1.0
    assert classic_family("FluxKontextPipeline").guided_above is None
    assert classic_family("ChromaImg2ImgPipeline").guided_above == 1.0
    several = [each for each in (*TASKS, "QwenImageEditPipeline") if classic_family(each).takes_several]
    assert several == [
        "QwenImageEditPlusPipeline", "JoyImageEditPlusPipeline", "BriaFibo2Pipeline", "Flux2Pipeline",
        "Flux2KleinPipeline",
    ]  # fmt: skip
    assert classic_family("JoyImageEditPlusPipeline").begins_with == {"image": "images"}


REFUSALS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "no picture": ("img2img", {"inputs": ()}, "image", "'demo' is not for text-to-image; it is for image-to-image"),
    "a mask too many": ("img2img", {"inputs": (IMAGE, WHERE)}, "mask", "is not for inpaint; it is for image-to-image"),
    "no mask": ("inpaint", {"inputs": (IMAGE,)}, "mask", "is not for image-to-image; it is for inpaint"),
    "several": ("kontext", {"inputs": (IMAGE, IMAGE)}, "image", "'demo' takes one image, got 2"),
    "strength": ("kontext", {"strength": 0.5}, "strength", "'demo' always does all steps; leave strength out"),
    "no control": ("control of a picture", {"inputs": (IMAGE,)}, "control_image", "is not for image-to-image; it"),
    "no image": ("control of a picture", {"inputs": (CONTROL,)}, "image", "takes image, control_image; got c"),
    "a last frame": ("image to video", {"inputs": (IMAGE, LAST)}, "last_image", "is not for first-last-frame-to-video"),
    "a second negative prompt": (
        "skyreels image to video", {"negative_prompt": None, "extra_params": {"negative_prompt_2": "blurry"}},
        "extra_params.negative_prompt_2", "negative_prompt_2 has no effect without negative_prompt; send both",
    ),
    "a scale": ("image to video", {"guidance_scale_2": 2.0}, "guidance_scale_2", "has one scale"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_model_does_not_begin_with_is_refused_by_name(folder_of: Callable[[str], Path], name: str) -> None:
    case, changes, param, said = REFUSALS[name]
    loaded = load_model(model(folder_of(case)), ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60))
    with pytest.raises(InvalidParameter, match=said) as refused:
        begin(loaded, replace(CASES[case][2], **changes))
    assert refused.value.param == param


@pytest.mark.parametrize("name", ["img2img", "cogview control", "sd3 controlnet", "joy edit"])
def test_a_picture_of_a_seed_is_the_same_among_several(folder_of: Callable[[str], Path], name: str) -> None:
    _, _, request, _ = CASES[name]
    latents, _ = alone(folder_of(name), replace(request, n=2))
    single, _ = alone(folder_of(name), replace(request, n=1, seed=request.seed + 1))
    assert error(latents[1:], single) <= BAR


@pytest.mark.parametrize(("strength", "steps"), [(0.01, 1), (0.5, 2), (1.0, 4), (None, 3)])
def test_the_strength_is_the_share_of_the_steps(
    folder_of: Callable[[str], Path], strength: float | None, steps: int
) -> None:
    loaded = load_model(model(folder_of("img2img")), ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60))
    denoising = begun(loaded, replace(CASES["img2img"][2], n=1, strength=strength))
    assert denoising.total_steps == steps
    while not denoising.done:
        denoising.step()
    assert len(denoising.finish()) == 1
