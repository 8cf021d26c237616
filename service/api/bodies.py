"""The declared bodies of requests, for the routers, `/openapi.json` and `spray generate`.

A parsed JSON object or form comes in; a validated body goes out, or an error that names the first wrong field. Unknown
fields are refused, and the error suggests the nearest known one. Fields of OpenAI and other servers that have no effect
here are accepted, and named in the answer's `x-ignored-params`.
"""

import difflib
import re
import unicodedata
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from service.api.picture_fields import Picture, Pictures
from workers.errors import InvalidParameter
from workers.messages import ImageFormat, PreviewDecoder

MAX_SEED = 2**53 - 1
"""The largest integer that JSON numbers carry exactly in every language."""

MOST_JOB_SECONDS = 31_536_000
"""The most seconds until a job's deadline."""

INVISIBLE = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})
"""Unicode's categories of spaces, line breaks, control characters and the like."""

PICTURE_INPUTS = frozenset(
    {"image", "images", "image_url", "mask", "mask_image", "markup", "input_reference", "last_image"}
    | {"control_image", "video", "video_reference"}
)
"""Fields that hold pictures or videos to start from, in this API or in others."""


def _visible(text: str) -> str:
    if all(unicodedata.category(character) in INVISIBLE for character in text):
        raise ValueError("must have a visible character")
    return text


WEBHOOK = "is called with a POST when the job has ended; its host must be one of the deployment's webhook_hosts"
OVERTAKES = "interactive jobs overtake others, until those have waited long enough"
OF_JOBS = "with the header prefer: respond-async alone"

BOUNDS = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}
"""Keywords of JSON schema for pydantic's, which pydantic does not translate behind a `BeforeValidator`."""


def _with_bounds(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_bounds(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {BOUNDS.get(key, key): _with_bounds(part) for key, part in schema.items()}


def _true_schema(schema: dict[str, Any]) -> None:
    """Add to the JSON schema what `Body` does: bounds, and null for fields that may be absent."""
    schema["properties"] = _with_bounds(schema.get("properties", {}))
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        field.pop("title", None)
        kinds = field.get("anyOf", [])
        if name in required or {"type": "null"} in kinds or not set(field) - {"default", "description"}:
            continue
        kept = {key: field.pop(key) for key in ("default", "description") if key in field}
        inner = dict(field)
        field.clear()
        field.update({"anyOf": [*(kinds or [inner]), {"type": "null"}]} | kept)


def _whole(given: object) -> object:
    """Accept 7.0 as a whole number, as JSON does."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


def _seconds(given: object) -> object:
    """Accept a number as text, as OpenAI's clients send it."""
    return float(given) if isinstance(given, str) and re.fullmatch(SECONDS, given) else given


SECONDS = r"^[0-9]{1,4}(\.[0-9]{1,6})?$"
Seconds = Annotated[
    float,
    Field(gt=0, le=3600),
    BeforeValidator(_seconds, Annotated[float, Field(gt=0, le=3600)] | Annotated[str, Field(pattern=SECONDS)]),
]
Text = Annotated[str, Field(max_length=32_000)]
Prompt = Annotated[Text, Field(min_length=1), AfterValidator(_visible)]
Whole = Annotated[int, BeforeValidator(_whole)]
Seed = Annotated[Whole, Field(ge=0, le=MAX_SEED)]
Scale = Annotated[float, Field(ge=0, le=30)]
Scalar = str | bool | float
JobPriority = Literal["interactive", "standard", "batch"]
ResponseFormat = Literal["b64_json", "url", "file"]


class Body(BaseModel):
    """A JSON object of a request. A field that is null is as absent: OpenAI's clients send null for None.

    Attributes:
        PICTURES: fields that may be files of a form.
    """

    PICTURES: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_true_schema)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


class StreamOptions(Body):
    """What a stream contains besides the pictures."""

    include_progress: bool = Field(False, description="an event per step; without it, steps come as comments")
    preview_decoder: PreviewDecoder = Field(
        "linear", description="what makes previews: linear, a fast map to colors; vae, the model's own decoder"
    )


class LoRAChoice(Body):
    """An adapter of the model, by its name in the deployment."""

    name: str
    scale: float = Field(1.0, ge=-4, le=4)


def _as_list(given: object) -> object:
    return [given] if isinstance(given, dict) else given


LoRAChoices = Annotated[list[LoRAChoice], Field(max_length=8)]
OneOrMore = Annotated[LoRAChoices, BeforeValidator(_as_list, LoRAChoice | LoRAChoices)]


WITHOUT_EFFECT: Any = Field(None, description="accepted without effect")


class Ignored(Body):
    """Fields that are accepted without effect; the answer's `x-ignored-params` names those that were sent."""

    user: str | None = WITHOUT_EFFECT
    safety_identifier: str | None = WITHOUT_EFFECT
    quality: str | None = WITHOUT_EFFECT
    generator_device: Scalar | None = WITHOUT_EFFECT
    enable_teacache: Scalar | None = WITHOUT_EFFECT
    vae_use_slicing: Scalar | None = WITHOUT_EFFECT
    vae_use_tiling: Scalar | None = WITHOUT_EFFECT
    return_stage_metrics: Scalar | None = WITHOUT_EFFECT
    enhance_prompt: Scalar | None = WITHOUT_EFFECT
    bot_task: Scalar | None = WITHOUT_EFFECT
    perf_dump_path: Scalar | None = WITHOUT_EFFECT
    output_path: Scalar | None = WITHOUT_EFFECT


class GenerationBody(Ignored):
    """The fields that pictures and videos share. Absent ones get the model's defaults."""

    prompt: Prompt = Field(description="what to draw; must have a visible character")
    model: str | None = Field(None, description="a name or an alias; may be absent if there is one model")
    size: str = Field("auto", description="WIDTHxHEIGHT within the model's limits, or auto: the model's default")
    width: Whole | None = Field(None, ge=1, description="pixels; with `height`, instead of `size`")
    height: Whole | None = Field(None, ge=1, description="pixels; with `width`, instead of `size`")
    negative_prompt: Text | None = Field(None, description="what to avoid")
    num_inference_steps: Whole | None = Field(None, ge=1, description="denoising steps; absent: the model's default")
    guidance_scale: Scale | None = Field(None, description="how closely to follow the prompt")
    true_cfg_scale: Scale | None = Field(
        None, description="another name of guidance_scale where guidance is by two branches"
    )
    guidance_scale_2: Scale | None = Field(None, description="the same, of a video model's second transformer")
    flow_shift: float | None = Field(None, ge=0.01, le=100, description="shift of the noise schedule; only some models")
    seed: Seed | None = Field(None, description="draws the same again; absent: a random one, which the answer names")
    loras: LoRAChoices | None = Field(None, description="adapters of the deployment")
    lora: OneOrMore | None = Field(None, description="another name of `loras`, also for a single one")
    extra_params: dict[str, Any] | None = Field(None, description="of one model's pipeline alone, by name")
    extra_body: dict[str, Any] | str | None = Field(
        None,
        description="more fields of this body, as an object or as JSON text; clients that know only OpenAI's send it",
    )
    n: Whole | None = Field(None, ge=1, le=10, description="how many; absent: 1")
    num_outputs_per_prompt: Whole | None = Field(None, ge=1, le=10, description="another name of `n`")
    embed_metadata: bool = Field(True, description="write the parameters, prompt and seed included, into the files")
    response_format: ResponseFormat | None = Field(
        None, description="b64_json: base64 in JSON; url: in JSON, where to fetch it; file: the bytes, a zip if several"
    )
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: Whole = Field(0, ge=0, le=3, description="previews in a stream, spread over the steps")
    stream_options: StreamOptions = Field(StreamOptions(), description="what a stream contains besides the pictures")

    @property
    def ignored(self) -> list[str]:
        """Fields in this body that have no effect."""
        return sorted((Ignored.model_fields.keys() | {"style", "moderation", "input_fidelity"}) & self.model_fields_set)


class ImageGenerationBody(GenerationBody):
    """Body of `POST /v1/images/generations`: OpenAI's fields, and those that diffusion adds."""

    seeds: list[Seed] | None = Field(None, min_length=1, max_length=10, description="one for each of the n pictures")
    output_format: ImageFormat = Field("png", description="of the files")
    output_compression: Whole = Field(100, ge=0, le=100, description="quality of jpeg and webp")
    background: Literal["auto", "opaque"] = Field("auto", description="all pictures are opaque")
    priority: JobPriority = Field("standard", description=f"{OF_JOBS}: {OVERTAKES}")
    deadline_s: float | None = Field(
        None, gt=0, le=MOST_JOB_SECONDS, description=f"{OF_JOBS}: seconds after which the pictures are worth nothing"
    )
    webhook_url: str | None = Field(None, max_length=2000, description=f"{OF_JOBS}: {WEBHOOK}")
    style: str | None = WITHOUT_EFFECT
    moderation: str | None = WITHOUT_EFFECT


class ImageEditBody(ImageGenerationBody):
    """Body of `POST /v1/images/edits`. Pictures are files of a form, or data: URLs."""

    PICTURES: ClassVar = frozenset({"image", "images", "mask", "mask_image", "control_image"})

    size: str = Field("auto", description="WIDTHxHEIGHT within the model's limits, or auto: of the image's shape")
    image: Pictures | None = Field(
        None, description="what to change: a PNG, JPEG or WebP; the first frame counts; some models take several"
    )
    images: Pictures | None = Field(None, description="another name of `image`")
    mask: Picture | None = Field(
        None, description="where to draw anew: where it is white, or where it is transparent; of the image's size"
    )
    mask_image: Picture | None = Field(None, description="another name of `mask`")
    control_image: Picture | None = Field(
        None, description="what to follow, such as edges or depths, for models whose task is control"
    )
    strength: float | None = Field(
        None,
        ge=0.01,
        le=1,
        description="share of the steps that are done; 1 keeps nothing of the image; absent: as the pipeline has it",
    )
    input_fidelity: str | None = WITHOUT_EFFECT


class VideoGenerationBody(GenerationBody):
    """Body of `POST /v1/videos/sync`. Pictures are files of a form, or data: URLs."""

    PICTURES: ClassVar = frozenset({"input_reference", "image", "last_image", "video"})

    size: str = Field(
        "auto",
        description="WIDTHxHEIGHT within the model's limits, or auto: the model's default, or of the picture's shape",
    )
    input_reference: Picture | None = Field(
        None, description="the picture that the video begins with: a PNG, JPEG or WebP"
    )
    image: Picture | None = Field(None, description="another name of `input_reference`")
    last_image: Picture | None = Field(None, description="the picture that it ends with")
    video: Picture | None = Field(None, description="the clip to change, instead of a picture: an MP4")
    strength: float | None = Field(
        None, ge=0.01, le=1, description="with `video`: share of the steps that are done; 1 keeps nothing of the clip"
    )

    n: Whole | None = Field(None, ge=1, le=1, description="videos: one")
    num_outputs_per_prompt: Whole | None = Field(None, ge=1, le=1, description="another name of `n`")
    num_frames: Whole | None = Field(None, ge=1, description="comes before `seconds`; absent: the model's default")
    seconds: Seconds | None = Field(
        None,
        description="how long, instead of num_frames: as near as possible with a number of frames that the model makes",
    )
    fps: Whole | None = Field(None, ge=1, le=120, description="frames per second; absent: the model's default")


def _no_stream(given: bool) -> bool:
    if given:
        raise ValueError("must be false: the answer is a job, which can be asked for how it is doing")
    return given


class RemixBody(Body):
    """Body of `POST /v1/videos/{id}/remix`. All else is that of the video which it varies."""

    prompt: Prompt = Field(description="what to draw instead; must have a visible character")
    webhook_url: str | None = Field(None, max_length=2000, description=WEBHOOK)


class VideoJobBody(VideoGenerationBody):
    """Body of `POST /v1/videos`. Its answer is a job, so what is for answers with the video itself is refused."""

    response_format: Literal["file"] | None = Field(None, description="file: the bytes, at the job's content")
    stream: Annotated[bool, AfterValidator(_no_stream)] = Field(
        False, description="false: the answer is the job", json_schema_extra={"const": False}
    )
    priority: JobPriority = Field("standard", description=OVERTAKES)
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=MOST_JOB_SECONDS,
        description="seconds after which the video is worth nothing; then the job expires",
    )
    webhook_url: str | None = Field(None, max_length=2000, description=WEBHOOK)


WHERE_PICTURES_GO = (
    "pictures to begin with are taken as `image` and `mask` at /v1/images/edits, and as `input_reference` and "
    "`last_image` at /v1/videos"
)

Kind = TypeVar("Kind", bound=Body)


def parse_body(raw: object, kind: type[Kind], from_text: bool = False) -> Kind:
    """Validate a body.

    Args:
        raw: parsed JSON, or the fields of a form.
        kind: the body that the route takes.
        from_text: whether numbers and booleans may be text, as in forms.

    Raises:
        InvalidParameter: a field is wrong; the error names the first one.
    """
    if not isinstance(raw, dict):
        raise InvalidParameter(None, "the body must be a JSON object or a form", "invalid_body")
    try:
        return kind.model_validate(raw, strict=not from_text)
    except ValidationError as error:
        mistakes = sorted(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
        raise _invalid(mistakes[0], kind) from None  # a misspelled field first: it explains the missing one


def _invalid(mistake: Any, kind: type[Body]) -> InvalidParameter:
    param = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        if param in PICTURE_INPUTS:
            return InvalidParameter(param, f"{param!r} is not supported here; {WHERE_PICTURES_GO}", "unknown_parameter")
        close = difflib.get_close_matches(param, kind.model_fields, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return InvalidParameter(param, f"unknown parameter {param!r}{hint}", "unknown_parameter")
    if mistake["type"] == "missing":
        return InvalidParameter(param, f"{param!r} is required", "missing_required_parameter")
    return InvalidParameter(param, f"{param}: {mistake['msg'].removeprefix('Value error, ')}")
