"""Request bodies -> messages: OpenAI's image generation in, `GenerationRequest` out. For routers and `spray generate`.

Unknown fields are refused, and the error suggests the nearest known one. OpenAI's fields that have no meaning for
diffusion are accepted and named in the answer's `x-ignored-params`.
"""

import asyncio
import difflib
import json
import re
import secrets
import unicodedata
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from deploy.spec import Limits, ModelSpec, Task
from workers.errors import InvalidParameter, ModelNotFound
from workers.messages import GenerationRequest, ImageFormat

MAX_SEED = 2**53 - 1
"""The largest integer that JSON numbers carry exactly in every language."""

MAX_KEYS = 100
"""Of an object in a body."""

IGNORED = frozenset({"quality", "style", "moderation", "user", "safety_identifier"})

BODY_S = 30.0
"""For reading a body. Serve's proxies already wait for all but the largest: see `service.edge`."""

INVISIBLE = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})
"""Unicode's categories of spaces, line breaks, control characters and the like."""


def _visible(text: str) -> str:
    if all(unicodedata.category(character) in INVISIBLE for character in text):
        raise ValueError("must have a visible character")
    return text


Text = Annotated[str, Field(max_length=32_000)]
Prompt = Annotated[Text, Field(min_length=1), AfterValidator(_visible)]


class Body(BaseModel):
    """A JSON object of a request. A field that is null is as absent: OpenAI's clients send null for None."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


class StreamOptions(Body):
    """What a stream contains besides the pictures."""

    include_progress: bool = False


class LoRAChoice(Body):
    """An adapter of the model, by its name in the deployment."""

    name: str
    scale: float = Field(1.0, ge=-4, le=4)


class GenerationBody(Body):
    """The fields that pictures and videos share. Absent ones get the model's defaults."""

    prompt: Prompt
    model: str | None = None
    size: str = "auto"
    user: str | None = None
    safety_identifier: str | None = None

    negative_prompt: Text | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=30)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    loras: Annotated[list[LoRAChoice], Field(max_length=8)] = []

    @property
    def ignored(self) -> list[str]:
        """Fields in this body that have no effect."""
        return sorted(IGNORED & self.model_fields_set)


class ImageGenerationBody(GenerationBody):
    """Body of `POST /v1/images/generations`: OpenAI's fields, and those that diffusion adds."""

    n: int = Field(1, ge=1, le=10)
    response_format: Literal["b64_json"] = "b64_json"
    output_format: ImageFormat = "png"
    output_compression: int = Field(100, ge=0, le=100)
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    partial_images: Literal[0] = 0
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None


class VideoGenerationBody(GenerationBody):
    """Body of `POST /v1/videos/sync`."""

    num_frames: int | None = Field(None, ge=1)
    fps: int | None = Field(None, ge=1, le=120)
    guidance_scale_2: float | None = Field(None, ge=0, le=30)


Kind = TypeVar("Kind", bound=GenerationBody)


async def read_json(chunks: AsyncIterator[bytes], max_bytes: int) -> object:
    """The JSON of a request's body.

    Raises:
        InvalidParameter: the body is not JSON, too large, too slow, or has too many keys; its rest is not read.
    """
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in chunks:
                raw += chunk
                if len(raw) > max_bytes:
                    raise InvalidParameter(None, f"the body is larger than {max_bytes} bytes", "body_too_large")
    except TimeoutError:
        raise InvalidParameter(None, f"the body did not arrive within {BODY_S:g} s", "body_timeout") from None
    try:
        return json.loads(raw, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        raise InvalidParameter(None, "the body is not JSON", "invalid_body") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:  # to find the one to complain about takes long
        raise InvalidParameter(None, f"an object has more than {MAX_KEYS} keys", "invalid_body")
    return dict(pairs)


def parse_body(raw: object, kind: type[Kind]) -> Kind:
    """Validate a body.

    Raises:
        InvalidParameter: a field is wrong; the error names the first one.
    """
    if not isinstance(raw, dict):
        raise InvalidParameter(None, "the body must be a JSON object", "invalid_body")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        mistakes = sorted(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
        raise _invalid(mistakes[0], kind) from None  # a misspelled field first: it explains the missing one


def _invalid(mistake: Any, kind: type[GenerationBody]) -> InvalidParameter:
    param = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        close = difflib.get_close_matches(param, kind.model_fields, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return InvalidParameter(param, f"unknown parameter {param!r}{hint}", "unknown_parameter")
    if mistake["type"] == "missing":
        return InvalidParameter(param, f"{param!r} is required", "missing_required_parameter")
    return InvalidParameter(param, f"{param}: {mistake['msg'].removeprefix('Value error, ')}")


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


def to_request(body: GenerationBody, model: ModelSpec, request_id: str) -> GenerationRequest:
    """Turn a body into a request that needs no further choice: defaults filled in, limits checked, the seed drawn.

    A retry on another gang therefore draws the same picture.

    Raises:
        InvalidParameter: the request exceeds the model's limits, or the model is for another task.
    """
    defaults = model.defaults
    width, height = _size(body.size, model)
    request = GenerationRequest(
        request_id=request_id,
        model=model.name,
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=body.num_inference_steps or defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale if body.guidance_scale is None else body.guidance_scale,
        guidance_scale_2=defaults.guidance_scale_2,
        loras=_loras(body.loras, model),
        seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
        seed_drawn=body.seed is None,
    )
    if isinstance(body, ImageGenerationBody):
        _for("text-to-image", model, "it makes videos: ask at /v1/videos/sync")
        request = replace(
            request,
            n=body.n,
            output_format=body.output_format,
            output_compression=body.output_compression,
            report_steps=body.stream,
        )
    elif isinstance(body, VideoGenerationBody):
        _for("text-to-video", model, "it makes pictures: ask at /v1/images/generations")
        request = replace(
            request,
            num_frames=body.num_frames or defaults.num_frames,
            fps=body.fps or defaults.fps,
            guidance_scale_2=defaults.guidance_scale_2 if body.guidance_scale_2 is None else body.guidance_scale_2,
            output_format="mp4",
        )
    _check_limits(request, model.limits)
    return request


def _check_limits(request: GenerationRequest, limits: Limits) -> None:
    """Reject what exceeds the limits of the model; those of the size are checked by `_size`."""
    _at_most("num_inference_steps", request.num_inference_steps, limits.max_num_inference_steps)
    _at_most("num_frames", request.num_frames, limits.max_num_frames)
    _at_most("n", request.n, limits.max_n)
    if request.seed + request.n - 1 > MAX_SEED:
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


def _for(task: Task, model: ModelSpec, instead: str) -> None:
    if model.tasks is not None and task not in model.tasks:
        raise InvalidParameter("model", f"{model.name!r} is not for {task}; {instead}", "wrong_task")


def _size(size: str, model: ModelSpec) -> tuple[int, int]:
    if size == "auto":
        return model.defaults.width, model.defaults.height
    limits = model.limits
    allowed = f"WIDTHxHEIGHT up to {limits.max_width}x{limits.max_height} in multiples of {limits.size_multiple}"
    numbers = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    if numbers is None:
        raise InvalidParameter("size", f"size {size!r} is not of the form {allowed}, or 'auto'", "invalid_size")
    width, height = int(numbers[1]), int(numbers[2])
    fits = 0 < width <= limits.max_width and 0 < height <= limits.max_height
    if not fits or width % limits.size_multiple or height % limits.size_multiple:
        raise InvalidParameter("size", f"size {size} is not allowed; allowed: {allowed}", "invalid_size")
    return width, height


def _loras(chosen: list[LoRAChoice], model: ModelSpec) -> tuple[tuple[str, float], ...]:
    known = list(dict.fromkeys(lora.name for lora in model.loras))
    names = [choice.name for choice in chosen]
    for name in names:
        if name not in known:
            available = ", ".join(known) or "none"
            raise InvalidParameter("loras", f"{model.name!r} has no adapter {name!r}; available: {available}")
        if names.count(name) > 1:
            raise InvalidParameter("loras", f"the adapter {name!r} is named twice")
    return tuple((choice.name, choice.scale) for choice in chosen)


def _at_most(param: str, value: int, limit: int) -> None:
    if value > limit:
        raise InvalidParameter(param, f"{param} must be at most {limit}, got {value}")
