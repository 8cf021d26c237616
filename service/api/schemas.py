"""Turns bodies into messages, for the routers and `spray generate`.

A validated body comes in; a `GenerationRequest` in which everything is settled goes out.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deploy.model_sections import Limits
from deploy.model_spec import ModelSpec, Task
from deploy.tasks import tasks_of
from service.api.bodies import (
    MAX_SEED,
    GenerationBody,
    ImageEditBody,
    ImageGenerationBody,
    LoRAChoice,
    VideoGenerationBody,
)
from service.api.clips import frames_of
from service.api.pictures import size_of
from workers.errors import InvalidParameter, ModelNotFound
from workers.messages import GenerationRequest, MediaInput, MediaRole, PreviewOptions


def find_model(models: dict[str, ModelSpec], name: str | None) -> ModelSpec:
    """The model of this name or alias; without a name, the only model.

    Raises:
        ModelNotFound: the deployment does not have the model.
        InvalidParameter: no name was given, and there are several models.
    """
    known = ", ".join(models)
    if name is None:
        if len(models) != 1:
            raise InvalidParameter("model", f"'model' is required; available: {known}", "missing_required_parameter")
        return next(iter(models.values()))
    found = models.get(name) or next((model for model in models.values() if name in model.aliases), None)
    if found is None:
        raise ModelNotFound(f"the model {name!r} does not exist; available: {known}")
    return found


def media_of(body: GenerationBody, model: ModelSpec) -> tuple[tuple[MediaRole, bytes], ...]:
    """The input files of a body, each with its role; empty if it begins with noise.

    Raises:
        InvalidParameter: a file needs another one, or the model is for another task; or a field is only for files.
    """
    found: list[tuple[MediaRole, bytes | None]] = []
    first = "image"
    if isinstance(body, ImageEditBody):
        found += [("image", each) for each in _either(body, "image", "images") or []]
        found += [("control_image", body.control_image), ("mask", _either(body, "mask", "mask_image"))]
    elif isinstance(body, VideoGenerationBody):
        first = "input_reference"
        found += [("image", _either(body, first, "image")), ("last_image", body.last_image)]
        found += [("video", body.video)]
    files = tuple((role, data) for role, data in found if data is not None)
    roles = {role for role, _ in files}
    is_edit = isinstance(body, ImageEditBody)
    begins = roles & ({"image", "control_image"} if is_edit else {"image"})  # a mask may be of the one that controls
    if not begins and (is_edit or "last_image" in roles):
        raise InvalidParameter(first, f"{first!r} is required", "missing_required_parameter")
    if "video" in roles and len(roles) > 1:
        raise InvalidParameter("video", "a video begins with a picture or with a clip; leave one out")
    if not files and getattr(body, "strength", None) is not None:
        raise InvalidParameter("strength", "strength is of what begins with a picture or a clip; leave it out")
    _for(tasks_of([role for role, _ in files], isinstance(body, VideoGenerationBody)), model)
    return files


def to_request(
    body: GenerationBody, model: ModelSpec, request_id: str, inputs: tuple[MediaInput, ...] = ()
) -> GenerationRequest:
    """Turn a body into a request in which everything is settled: defaults filled in, limits checked, the seed drawn.

    So a retry on another gang draws the same picture.

    Args:
        body: what is asked for.
        model: the model of the request.
        request_id: unique.
        inputs: the decoded files of `media_of`.

    Raises:
        InvalidParameter: the request exceeds the model's limits, or contradicts itself.
    """
    defaults = model.defaults
    width, height = _size(body, model, size_of(inputs[0]) if inputs else None)
    guidance_scale = _either(body, "guidance_scale", "true_cfg_scale")
    n = _either(body, "n", "num_outputs_per_prompt") or 1
    seeds = _seeds(body, n)
    request = GenerationRequest(
        request_id=request_id,
        model=model.name,
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=body.num_inference_steps or defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
        guidance_scale_2=defaults.guidance_scale_2,
        loras=_loras(_either(body, "loras", "lora") or [], model),
        seed=seeds[0] if seeds else secrets.randbelow(2**32),
        seed_drawn=not seeds,
        seeds=seeds if len(seeds) > 1 else (),
        true_cfg=body.true_cfg_scale is not None,
        flow_shift=body.flow_shift,
        n=n,
        report_steps=body.stream,
        previews=_previews(body),
        extra_params=_extra(body),
        embed_metadata=body.embed_metadata,
        inputs=inputs,
        strength=body.strength if isinstance(body, ImageEditBody | VideoGenerationBody) else None,
    )
    if isinstance(body, ImageGenerationBody):
        if body.guidance_scale_2 is not None:
            raise InvalidParameter("guidance_scale_2", f"{model.name!r} is asked for pictures; only videos have it")
        request = replace(request, output_format=body.output_format, output_compression=body.output_compression)
    elif isinstance(body, VideoGenerationBody):
        fps = body.fps or defaults.fps
        request = replace(
            request,
            num_frames=_frames(body, fps) or _frames_of(inputs) or defaults.num_frames,
            frames_chosen=body.num_frames is None,
            fps=fps,
            guidance_scale_2=defaults.guidance_scale_2 if body.guidance_scale_2 is None else body.guidance_scale_2,
            output_format="mp4",
        )
    _check_limits(request, model.limits, "num_frames" if "num_frames" in body.model_fields_set else "seconds")
    return request


def check_kept(request: GenerationRequest, model: ModelSpec) -> None:
    """Check a request that was accepted before, and is to run anew, against what its model allows now.

    Args:
        request: everything in it is settled.
        model: the model that is to run it.

    Raises:
        InvalidParameter: the model is for other tasks now, or the request exceeds its limits, or an adapter is gone.
    """
    _for(tasks_of([each.role for each in request.inputs], request.output_format == "mp4"), model)
    _check_size("size", request.width, request.height, model.limits)
    _check_adapters([name for name, _ in request.loras], model)
    _check_limits(request, model.limits, "num_frames")


def _either(body: GenerationBody, name: str, other: str) -> Any:
    """The value of a field that has two names; None if neither is given."""
    first, second = getattr(body, name), getattr(body, other)
    if first is not None and second is not None and first != second:
        raise InvalidParameter(other, f"{other} is another name of {name}, and both are given; leave one out")
    return second if first is None else first


def _seeds(body: GenerationBody, n: int) -> tuple[int, ...]:
    """The seed of each picture, or only of the first; empty if the caller has set none."""
    seeds = body.seeds if isinstance(body, ImageGenerationBody) else None
    if seeds is None:
        return () if body.seed is None else (body.seed,)
    if len(seeds) != n:
        raise InvalidParameter("seeds", f"seeds has {len(seeds)} numbers for n = {n} pictures; give one for each")
    if body.seed not in (None, seeds[0]):
        raise InvalidParameter("seeds", f"seed is {body.seed}, and seeds begins with {seeds[0]}; leave one out")
    return tuple(seeds)


def _extra(body: GenerationBody) -> dict[str, Any]:
    """Parameters of the model's pipeline. Its ranks know their names and ranges; here it is enough that none is nested,
    since all that handles a request would have to follow it, and that each can be kept and told in any form."""
    for name, value in (body.extra_params or {}).items():
        if not _is_plain(value):
            raise InvalidParameter(
                f"extra_params.{name}",
                f"extra_params.{name} must be a number of at most 2**53, a text of valid Unicode, true or false",
            )
    return body.extra_params or {}


def _is_plain(value: object) -> bool:
    """Whether JSON, databases and Protocol Buffers all have this value."""
    if isinstance(value, str):
        return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)
    return isinstance(value, int | float) and abs(value) <= 2**53  # which no NaN is


def _previews(body: GenerationBody) -> PreviewOptions | None:
    """The previews of a stream; None: none."""
    if not body.stream and body.stream_options.model_fields_set:
        raise InvalidParameter("stream_options", "stream_options is for streams; add stream: true, or leave it out")
    if not body.partial_images:
        if "preview_decoder" in body.stream_options.model_fields_set:
            raise InvalidParameter(
                "stream_options.preview_decoder",
                "stream_options.preview_decoder is for previews; ask for partial_images, or leave it out",
            )
        return None
    if not body.stream:
        raise InvalidParameter("partial_images", "partial_images is for streams; add stream: true, or leave it out")
    return PreviewOptions(count=body.partial_images, decoder=body.stream_options.preview_decoder)


def _frames(body: VideoGenerationBody, fps: int) -> int | None:
    """The number of frames that the body asks for; None: the model's default. Of `seconds` it is 4k + 1, as most models
    take it; the ranks of the others lower it."""
    if body.num_frames is not None or body.seconds is None:
        return body.num_frames
    return 4 * round((body.seconds * fps - 1) / 4) + 1 if body.seconds * fps > 1 else 1


def most_frames(body: GenerationBody, model: ModelSpec) -> tuple[int, int]:
    """The most frames of a clip to read, since some models continue from its end, and the frames of the video."""
    most = model.limits.max_num_frames
    if not isinstance(body, VideoGenerationBody):
        return 1, 1
    asked = _frames(body, body.fps or model.defaults.fps) or most
    return most, min(asked, most)


def _frames_of(inputs: tuple[MediaInput, ...]) -> int | None:
    """The frames of a clip, as 4k + 1; None without a clip."""
    clip = next((each for each in inputs if each.role == "video"), None)
    return (frames_of(clip.data) - 1) // 4 * 4 + 1 if clip else None


def _check_limits(request: GenerationRequest, limits: Limits, frames: str) -> None:
    """Reject a request above the limits of the model; `_check_size` those of the size.

    Args:
        frames: the name of the field that sets the number of frames.
    """
    _at_most("num_inference_steps", request.num_inference_steps, limits.max_num_inference_steps)
    _at_most(frames, request.num_frames, limits.max_num_frames)
    _at_most("n", request.n, limits.max_n)
    if request.all_seeds[-1] > MAX_SEED:
        raise InvalidParameter(
            "seed", f"the last of {request.n} pictures would have a seed above {MAX_SEED}; lower seed or n"
        )
    work = request.width * request.height * request.num_frames * request.num_inference_steps * request.n
    if limits.max_work is not None and work > limits.max_work:
        raise InvalidParameter(
            None,
            f"width x height x num_frames x num_inference_steps x n is {work}, at most {limits.max_work} is allowed; "
            "lower one of them",
            "too_much_work",
        )


PATHS: Mapping[Task, str] = {
    "text-to-image": "/v1/images/generations",
    "text-to-video": "/v1/videos/sync",
    "image-to-image": "/v1/images/edits",
    "inpaint": "/v1/images/edits",
    "edit": "/v1/images/edits",
    "control": "/v1/images/edits",
    "image-to-video": "/v1/videos/sync",
    "first-last-frame-to-video": "/v1/videos/sync",
    "video-to-video": "/v1/videos/sync",
}
"""The path for each task."""


def _for(tasks: tuple[Task, ...], model: ModelSpec) -> None:
    if model.tasks is not None and not set(tasks) & set(model.tasks):
        able = ", ".join(f"{other} (ask at {PATHS[other]})" for other in model.tasks)
        raise InvalidParameter("model", f"{model.name!r} is not for {tasks[0]}; it is for {able}", "wrong_task")


def _like(image: tuple[int, int], model: ModelSpec) -> tuple[int, int]:
    """The size of a picture that is made from another: its shape and pixels, but not more pixels than the default."""
    limits, (width, height) = model.limits, image
    most = model.defaults.width * model.defaults.height
    scale = min(1.0, (most / (width * height)) ** 0.5, limits.max_width / width, limits.max_height / height)
    multiple = limits.size_multiple

    def near(edge: int, longest: int) -> int:
        return int(multiple * max(1, min(round(edge * scale / multiple), longest // multiple)))

    return near(width, limits.max_width), near(height, limits.max_height)


def _size(body: GenerationBody, model: ModelSpec, image: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height in pixels, from `size`, from `width` and `height`, from the image, or the model's defaults."""
    param, size = "size", body.size
    if body.width is not None or body.height is not None:
        if body.width is None or body.height is None:
            param = "height" if body.height is None else "width"
            raise InvalidParameter(param, f"width and height go together, and {param!r} is missing", "invalid_size")
        param, both = "width", f"{body.width}x{body.height}"
        if size not in ("auto", both):
            raise InvalidParameter(
                "size", f"size is {size!r}, but width x height is {both}; leave one out", "invalid_size"
            )
        size = both
    if size == "auto" and image:
        return _like(image, model)
    if size == "auto":
        return model.defaults.width, model.defaults.height
    numbers = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    if numbers is None:
        form = _allowed_sizes(model.limits)
        raise InvalidParameter(param, f"size {size!r} is not of the form {form}, or 'auto'", "invalid_size")
    width, height = int(numbers[1]), int(numbers[2])
    _check_size(param, width, height, model.limits)
    return width, height


def _allowed_sizes(limits: Limits) -> str:
    return f"WIDTHxHEIGHT up to {limits.max_width}x{limits.max_height} in multiples of {limits.size_multiple}"


def _check_size(param: str, width: int, height: int, limits: Limits) -> None:
    fits = 0 < width <= limits.max_width and 0 < height <= limits.max_height
    if not fits or width % limits.size_multiple or height % limits.size_multiple:
        text = f"size {width}x{height} is not allowed; allowed: {_allowed_sizes(limits)}"
        raise InvalidParameter(param, text, "invalid_size")


def _loras(chosen: list[LoRAChoice], model: ModelSpec) -> tuple[tuple[str, float], ...]:
    _check_adapters([choice.name for choice in chosen], model)
    return tuple((choice.name, choice.scale) for choice in chosen)


def _check_adapters(names: list[str], model: ModelSpec) -> None:
    known = list(dict.fromkeys(lora.name for lora in model.loras))
    for name in names:
        if name not in known:
            available = ", ".join(known) or "none"
            raise InvalidParameter("loras", f"{model.name!r} has no adapter {name!r}; available: {available}")
        if names.count(name) > 1:
            raise InvalidParameter("loras", f"the adapter {name!r} is named twice")


def _at_most(param: str, value: int, limit: int) -> None:
    if value > limit:
        raise InvalidParameter(param, f"{param} must be at most {limit}, got {value}")
