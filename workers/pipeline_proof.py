"""Does spray make what a pipeline of diffusers makes? The proof for one pipeline, on its demo model.

A model folder, a request and a pool of ranks come in; a `Proof` goes out, or `Unproved` says what differs. The classic
call runs on one process and is the reference. Called by `workers.support_matrix` and by the tests.

Some transformers round to half precision, whatever they are loaded in. There a last-bit difference becomes one of 4e-3,
and no two ways to compute the same agree to 1e-5. Such a pipeline is proved twice: without that rounding on both sides,
by the bar of all others; and as it is, where layouts may differ from the classic call as much as that does from itself
when what its transformer is given differs in the last bit.

A pipeline with a guardrail is proved with one that lets everything pass: its answer does not depend on layouts.
"""

import functools
import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from PIL import Image, ImageChops

from deploy.families.lookup import family_of
from deploy.families.pipeline_source import classic_call
from deploy.model_folder import is_component, read_index
from deploy.model_spec import ModelSpec
from sp_core.attention.region_attention import attention_kept_local
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.alone import in_fp32
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankFailed, RankPool
from sp_core.verify.verify import BAR, BLIND
from workers.gang.self_test import self_test
from workers.messages import GenerationRequest
from workers.model.adapters.classic import REWRITES, SCHEDULES
from workers.model.classic_denoising import begin
from workers.model.controlnets import control_modes
from workers.model.decoder_noise import fix_noise
from workers.model.denoising import Denoising
from workers.model.fixed_tiles import fixed_tiles
from workers.model.loader import LoadedModel, load_model
from workers.model.picture_inputs import read, read_clip
from workers.passing_checker import everything_passes
from workers.small_pictures import small_pictures

Dtype = Literal["bfloat16", "float16", "float32"]

Made = tuple[torch.Tensor, list[list[Image.Image]]]
"""The latents after the last step; and, on rank 0, the frames of each video, or the one of each picture."""

ALONE = ParallelDegrees()

LAYOUTS = {"u2": ParallelDegrees(ulysses_degree=2), "r2": ParallelDegrees(ring_degree=2)}

TENSOR = {"t2": ParallelDegrees(tensor_parallel_size=2)}
"""Tried where there is a tensor plan."""

PIXELS = 1
"""Steps of 1/255 by which pixels may differ: a last-bit difference may flip a rounding."""


class Unproved(Exception):
    """Something differs, fails, or proves nothing."""


@dataclass(frozen=True)
class Proof:
    """What was shown of a pipeline.

    Attributes:
        layouts: that make the same, by name.
        latents: the largest difference of latents, in units of max(1, max|reference|).
        pixels: the largest difference of pixels, in steps of 1/255.
        blind: how far the latents are with attention kept local.
        shipped: the largest difference of latents with the transformer's own rounding; 0: it rounds nothing.
        explained: by how much that rounding alone makes the classic call differ from itself.
    """

    layouts: tuple[str, ...]
    latents: float
    pixels: int
    blind: float
    shipped: float = 0.0
    explained: float = 0.0


LAST_BITS = 4
"""Ways in which the last bits differ, of which the one that matters most says what rounding explains."""

SLACK = 2
"""By which layouts may differ more than these few ways have shown."""


def prove(
    pipeline: str, folder: Path, request: GenerationRequest, pool: RankPool, tensor: bool, rounds: bool = False
) -> Proof:
    """Prove a pipeline on one rank and on all layouts of two.

    Args:
        pipeline: its class name.
        folder: a model of it.
        request: what to make.
        pool: of two ranks at least.
        tensor: its transformer has a tensor plan.
        rounds: its transformer rounds to half precision.

    Raises:
        Unproved: says what differs.
    """
    layouts = {"one rank": ALONE} | LAYOUTS | (TENSOR if tensor else {})
    (reference,) = _run(pool, ALONE, "the classic call", classic_answer, pipeline, folder, request, rounds)
    latents, pixels = _compared(pool, layouts, reference, (BAR, PIXELS), folder, request, rounds)
    local, drawn = _run(pool, LAYOUTS["u2"], "attention kept local", answer, folder, request, rounds, True)[0]
    blind = error(local, reference[0])
    if not blind > BLIND or apart(drawn, reference[1]) <= PIXELS:
        raise Unproved(f"with attention kept local the latents differ by {blind:.1e} only, so sameness proves nothing")
    proof = Proof(("1", *list(layouts)[1:]), latents, pixels, blind)
    return _proved_as_shipped(proof, pipeline, folder, request, pool, layouts) if rounds else proof


def _proved_as_shipped(
    proof: Proof,
    pipeline: str,
    folder: Path,
    request: GenerationRequest,
    pool: RankPool,
    layouts: dict[str, ParallelDegrees],
) -> Proof:
    """The proof, with what remains of it where the transformer rounds."""
    (shipped,) = _run(pool, ALONE, "the classic call", classic_answer, pipeline, folder, request)
    explained = pixels = 0.0
    for seed in range(1, LAST_BITS + 1):
        made = _run(pool, ALONE, "the classic call", classic_answer, pipeline, folder, request, False, seed)[0]
        explained = max(explained, _difference(made[0], shipped[0]))
        pixels = max(pixels, apart(made[1], shipped[1]))
    if not BAR < SLACK * explained < proof.blind / 10:
        raise Unproved(f"last bits make the classic call differ by {explained:.1e}, which explains all or nothing")
    bars = SLACK * explained, max(PIXELS, int(SLACK * pixels))
    differs, _ = _compared(pool, layouts, shipped, bars, folder, request)
    return replace(proof, shipped=differs, explained=explained)


def _compared(
    pool: RankPool,
    layouts: dict[str, ParallelDegrees],
    reference: Made,
    bars: tuple[float, int],
    folder: Path,
    request: GenerationRequest,
    exact: bool = False,
) -> tuple[float, int]:
    """How far the latents and the pixels of any layout are from the reference."""
    found = [
        _compare(name, _run(pool, degrees, name, answer, folder, request, exact), reference, bars)
        for name, degrees in layouts.items()
    ]
    return max(latents for latents, _ in found), max(pixels for _, pixels in found)


def answer(
    mesh: ParallelMesh,
    folder: Path,
    request: GenerationRequest,
    exact: bool = False,
    local: bool = False,
    dtype: Dtype = "float32",
) -> Made:
    """What this rank makes of a request, after the self-test.

    Args:
        mesh: the ranks, on whose device it is made.
        folder: the model.
        request: what to make.
        exact: nothing is rounded to half precision.
        local: with attention to this rank's own tokens only.
        dtype: of weights and activations.
    """
    device: Any = mesh.device.type
    spec = ModelSpec(name="demo", source=str(folder), device=device, parallel=mesh.degrees, dtype=dtype)
    with in_fp32() if exact else nullcontext(), everything_passes(read_index(folder)["_class_name"]):
        return draw(load_model(spec, mesh), request, local)


def draw(loaded: LoadedModel, request: GenerationRequest, local: bool = False) -> Made:
    """What this rank makes of a request with a model that is loaded; see `answer`."""
    folder = Path(loaded.spec.source)
    with small_pictures(folder):
        if loaded.mesh.degrees.world_size > 1 and not local:
            self_test(loaded, lambda small: _begun(loaded, small))
        denoising = _begun(loaded, request)
        with attention_kept_local() if local else nullcontext():
            while not denoising.done:
                denoising.step()
        denoising.join_pictures()
        latents = denoising.latents.clone()  # calls may write to them when they go on
        return latents, [_pixels(made) for made in denoising.finish()]


def _begun(loaded: LoadedModel, request: GenerationRequest) -> Denoising:
    denoising = begin(loaded, request)
    denoising.encode()
    denoising.share_encoded()
    denoising.prepare()
    return denoising


def classic_answer(
    mesh: ParallelMesh,
    pipeline: str,
    folder: Path,
    request: GenerationRequest,
    exact: bool = False,
    last_bits: int | None = None,
) -> Made:
    """What the pipeline's own call makes of a request.

    Args:
        mesh: of one rank.
        pipeline: its class name.
        folder: the model.
        request: what to make.
        exact: nothing is rounded to half precision.
        last_bits: the seed by which all that the transformer is given differs in its last bits; None: it does not.
    """
    with in_fp32() if exact else nullcontext(), everything_passes(pipeline):
        return _classic_answer(pipeline, folder, request, last_bits)


def _classic_answer(pipeline: str, folder: Path, request: GenerationRequest, last_bits: int | None) -> Made:
    absent = {name: None for name, entry in read_index(folder).items() if is_component(entry) and not entry[0]}
    classic = getattr(diffusers, pipeline).from_pretrained(folder, local_files_only=True, **absent)
    classic.set_progress_bar_config(disable=True)
    if vae := getattr(classic, "vae", None):
        if hasattr(vae, "enable_slicing"):
            vae.enable_slicing()  # pictures one by one, as we do
        draw_by_seed(vae, request.seed)
        fix_noise(vae)
        if fixed_tiles(vae):
            vae.enable_tiling()
    if last_bits is not None:
        _move_last_bits(classic.transformer, last_bits)
    if getattr(classic, "guider", None):
        classic.guider = classic.guider.new(guidance_scale=request.guidance_scale)
    parameters = inspect.signature(type(classic).__call__).parameters
    told = ({"control_mode": 0} if control_modes(classic) else {}) | _told(pipeline, request)
    seen: list[torch.Tensor] = []
    if "callback_on_step_end" in parameters:
        told["callback_on_step_end"] = lambda _pipeline, _i, _t, values: _see(seen, values["latents"], {})
    else:
        step = classic.scheduler.step

        @functools.wraps(step)  # pipelines look at its parameters
        def seen_step(*args: Any, **kwargs: Any) -> Any:
            stepped = step(*args, **kwargs)
            return _see(seen, stepped[0], stepped)

        classic.scheduler.step = seen_step
    with small_pictures(folder):
        said = {name: value for name, value in told.items() if value is not None} | dict.fromkeys(SCHEDULES)
        made = classic(**{name: value for name, value in said.items() if name in parameters})[0]
    return seen[-1], [_pixels(each) for each in made]


def _move_last_bits(transformer: torch.nn.Module, seed: int) -> None:
    """Give a transformer, for each number, the next one above or below."""
    generator = torch.Generator().manual_seed(seed)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        where = torch.randint(0, 2, value.shape, generator=generator).bool()
        return value.nextafter(torch.where(where, torch.inf, -torch.inf).to(value.dtype))

    def move(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}

    transformer.register_forward_pre_hook(move, with_kwargs=True)


def draw_by_seed(vae: Any, seed: int) -> None:
    """Draw from what a VAE makes of a picture by the request's seed, where the call names no generator, as we do."""
    encode = vae.encode

    @functools.wraps(encode)
    def seeded(*args: Any, **kwargs: Any) -> Any:
        encoded = encode(*args, **kwargs)
        torch.manual_seed(seed)
        return encoded

    vae.encode = seeded


def _told(pipeline: str, request: GenerationRequest) -> dict[str, Any]:
    """All names by which calls are told this request."""
    family = family_of(pipeline)
    call = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    weighs = "true_cfg_scale" in call and (family.guided_by_negative_prompt or family.guided_above is not None)
    scale = "true_cfg_scale" if weighs else "guidance_scale"
    roles: dict[str, Any] = {e.role: read_clip(e) if e.role == "video" else read(e) for e in request.inputs}
    if "image" in roles and family.takes_several:
        roles["image"] = [read(each) for each in request.inputs if each.role == "image"]
    source = classic_call(pipeline)
    generators = [torch.Generator().manual_seed(seed) for seed in request.all_seeds]
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "distilled_guidance_scale": request.guidance_scale,
        scale: request.guidance_scale,
        **dict.fromkeys(("num_frames", "frames", "video_length"), request.num_frames),
        **dict.fromkeys(("num_images_per_prompt", "num_videos_per_prompt"), request.n),
        **dict.fromkeys(("frame_rate", "fps"), request.fps),
        "generator": generators[0] if source and source.one_generator else generators,
        "output_type": "pil",
        "strength": request.strength,
        "max_area": request.width * request.height,
        "_auto_resize": False if family.sized_by_image else None,
        **dict.fromkeys(REWRITES, False),
        **{family.begins_with[role]: given for role, given in roles.items()},
        **request.extra_params,
    }


def _see(seen: list[torch.Tensor], latents: torch.Tensor, then: Any) -> Any:
    """Keep the latents, and return what the pipeline goes on with."""
    seen[:] = [latents.clone()]
    return then


def _run(pool: RankPool, degrees: ParallelDegrees, what: str, fn: Any, *args: Any) -> list[Made]:
    try:
        return pool.run(degrees, fn, *args)
    except RankFailed as failure:
        raise Unproved(f"{what} fails: {failure.said}") from failure


def _compare(what: str, found: list[Made], reference: Made, bars: tuple[float, int]) -> tuple[float, int]:
    """How far latents of all ranks and the pixels of the first are from the reference."""
    latents = max(_difference(latents, reference[0]) for latents, _ in found)
    pixels = apart(found[0][1], reference[1])
    if not latents <= bars[0] or pixels > bars[1]:
        raise Unproved(f"{what} differs: latents by {latents:.1e}, pixels by {pixels}/255")
    return latents, pixels


def _difference(latents: torch.Tensor, reference: torch.Tensor) -> float:
    return error(latents, reference) if latents.shape == reference.shape else math.inf


def apart(first: list[list[Image.Image]], second: list[list[Image.Image]]) -> int:
    """The largest difference of pixels; 255 where there are other numbers of frames or other sizes."""
    if [[each.size for each in frames] for frames in first] != [[each.size for each in frames] for frames in second]:
        return 255
    pairs = [pair for frames in zip(first, second, strict=True) for pair in zip(*frames, strict=True)]
    extremes: list[Any] = [ImageChops.difference(*pair).getextrema() for pair in pairs]  # of each color: least, most
    return max((most for of_colors in extremes for _, most in of_colors), default=255)


def _pixels(made: Any) -> list[Image.Image]:
    return [frame.convert("RGB") for frame in (made if isinstance(made, list) else [made])]
