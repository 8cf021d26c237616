"""The schema of a deployment file: DeploymentSpec > ModelSpec > Defaults, Limits, Placement, ParallelDegrees.

YAML comes in through `load_spec`; the frozen objects go to `service.app` (what to deploy), `workers.placement` (what a
gang occupies) and `workers.rank` (what to load). Unknown keys are errors.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sp_core.degrees import ParallelDegrees

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Pixels = Annotated[int, Field(ge=16, le=8192)]


class SpecError(ValueError):
    """A deployment file that cannot be used. The message has one line per mistake."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Defaults(_Section):
    """What a request gets where it does not say."""

    width: Pixels = Field(1024, description="pixels")
    height: Pixels = Field(1024, description="pixels")
    num_inference_steps: int = Field(50, ge=1, description="denoising steps")
    guidance_scale: float = Field(
        4.0, ge=0, le=30, description="strength of guidance; what is off depends on the model"
    )
    guidance_scale_2: float | None = Field(None, ge=0, le=30, description="of a second transformer; absent: the same")
    num_frames: int = Field(1, ge=1, description="frames of a video; 1 for pictures")
    fps: int = Field(16, ge=1, le=120, description="frames of a video per second")


class Limits(_Section):
    """What a request may ask for at most."""

    max_width: Pixels = Field(2048, description="pixels")
    max_height: Pixels = Field(2048, description="pixels")
    size_multiple: int = Field(16, ge=1, description="width and height must be multiples of this many pixels")
    max_num_inference_steps: int = Field(100, ge=1, description="denoising steps")
    max_num_frames: int = Field(121, ge=1, description="frames of a video")
    max_n: int = Field(4, ge=1, le=10, description="pictures per request")
    max_queued: int = Field(64, ge=1, description="requests that may wait for this model in each gateway; then 429")


class Placement(_Section):
    """What the gang of a model occupies."""

    cpus_per_rank: float = Field(1.0, gt=0, description="CPU cores that each rank reserves")


class WarmupShape(_Section):
    """A size that is run once at start, so that no caller waits for what a first run prepares."""

    width: Pixels = Field(description="pixels")
    height: Pixels = Field(description="pixels")
    num_frames: int = Field(1, ge=1, description="frames of a video; 1 for a picture")


class LoRA(_Section):
    """An adapter that a request may ask for by its name."""

    name: Name = Field(description="what a request calls it")
    source: str = Field(description="safetensors file; relative to the deployment file")
    component: Literal["transformer", "transformer_2"] = Field(
        "transformer", description="the transformer that it is for, where a model has two"
    )


class Timeouts(_Section):
    """When a gang is given up, in seconds."""

    startup_s: float = Field(1800.0, gt=0, description="start, rendezvous and loading of a gang")
    phase_s: float = Field(600.0, gt=0, description="one encode, one step or one decode without progress")
    ping_s: float = Field(10.0, gt=0, description="a rank that does not answer for so long hangs")


class ModelSpec(_Section):
    """One model: where its weights are and how its gangs look."""

    name: Name = Field(description="what a request calls it")
    source: str = Field(description="model folder in diffusers' format; relative to the deployment file")
    device: Literal["cuda", "cpu"] = Field("cuda", description="one device per rank")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="of weights and activations; default bfloat16 on cuda, float32 on cpu"
    )
    parallel: ParallelDegrees = Field(ParallelDegrees(), description="ranks of one gang, by axis")
    compile: bool = Field(False, description="compile the transformer's blocks; name warmup_shapes with it")
    warmup_shapes: tuple[WarmupShape, ...] = Field((), description="sizes that are run once at start")
    text_encoder: Literal["rank0", "replicate"] = Field(
        "rank0", description="which ranks hold the text encoders: the first, which sends what it encodes, or all"
    )
    vae: Literal["rank0", "all"] = Field(
        "all", description="which ranks hold the VAE: the first, or all, which then share the tiles of large outputs"
    )
    vae_tiling_above: int = Field(
        2048 * 2048, ge=0, description="width x height x frames above which the VAE decodes in tiles"
    )
    loras: tuple[LoRA, ...] = Field((), description="adapters that requests may ask for")
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    placement: Placement = Placement()
    timeouts: Timeouts = Timeouts()

    @field_validator("parallel", mode="before")
    @classmethod
    def _degrees_are_whole(cls, value: Any) -> Any:
        for name, degree in value.items() if isinstance(value, dict) else ():
            if not isinstance(degree, int) or isinstance(degree, bool):
                raise ValueError(f"{name} must be a whole number of at least 1, got {degree!r}")
        return value

    @model_validator(mode="after")
    def _defaults_are_within_limits(self) -> Self:
        pairs = [
            ("width", self.defaults.width, self.limits.max_width),
            ("height", self.defaults.height, self.limits.max_height),
            ("num_inference_steps", self.defaults.num_inference_steps, self.limits.max_num_inference_steps),
            ("num_frames", self.defaults.num_frames, self.limits.max_num_frames),
        ]
        for name, default, limit in pairs:
            if default > limit:
                raise ValueError(f"defaults.{name} is {default}, more than limits.max_{name}, {limit}; change one")
        for name, default, _ in pairs[:2]:
            if default % self.limits.size_multiple:
                raise ValueError(f"defaults.{name} is {default}, no multiple of {self.limits.size_multiple}")
        return self

    @field_validator("loras")
    @classmethod
    def _names_of_loras_are_unique(cls, loras: tuple[LoRA, ...]) -> tuple[LoRA, ...]:
        places = [(lora.name, lora.component) for lora in loras]
        for name, component in places:
            if places.count((name, component)) > 1:
                raise ValueError(f"two adapters for {component} are called {name!r}; give each its own name")
        return loras

    @model_validator(mode="after")
    def _warmup_is_within_limits(self) -> Self:
        limits = self.limits
        for i, shape in enumerate(self.warmup_shapes):
            if shape.width > limits.max_width or shape.height > limits.max_height:
                raise ValueError(
                    f"warmup_shapes.{i} is {shape.width}x{shape.height}, more than limits allow; change one"
                )
            if shape.width % limits.size_multiple or shape.height % limits.size_multiple:
                raise ValueError(f"warmup_shapes.{i} is no multiple of {limits.size_multiple} pixels")
            if shape.num_frames > limits.max_num_frames:
                raise ValueError(f"warmup_shapes.{i}.num_frames is more than limits.max_num_frames; change one")
        if self.compile and not self.warmup_shapes:
            raise ValueError("compile needs warmup_shapes, or the first callers would wait for the compiler")
        return self

    @property
    def torch_dtype(self) -> str:
        """The name of the torch dtype to load."""
        return self.dtype or ("bfloat16" if self.device == "cuda" else "float32")


class GatewaySpec(_Section):
    """Where clients reach the deployment."""

    host: str = Field("127.0.0.1", description="address to bind")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one")


class DeploymentSpec(_Section):
    """A whole deployment file."""

    models: tuple[ModelSpec, ...]
    gateway: GatewaySpec = GatewaySpec()

    @field_validator("models")
    @classmethod
    def _names_are_unique(cls, models: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
        if not models:
            raise ValueError("at least one model is needed")
        names = [model.name for model in models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are called {name!r}; give each its own name")
        return models


def load_spec(path: Path) -> DeploymentSpec:
    """Read a deployment file; relative model folders are taken from the file's own folder.

    Raises:
        SpecError: the file cannot be read, is not YAML, or breaks the schema.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: expected a mapping with the key 'models', got {type(raw).__name__}")
    try:
        spec = DeploymentSpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError("\n".join(f"{path}: {_explain(mistake)}" for mistake in error.errors())) from None
    folder = path.resolve().parent
    return spec.model_copy(update={"models": tuple(_beside(folder, model) for model in spec.models)})


def _beside(folder: Path, model: ModelSpec) -> ModelSpec:
    """The model with whole paths."""

    def whole(source: str) -> dict[str, str]:
        return {"source": str((folder / source).resolve())}

    loras = tuple(lora.model_copy(update=whole(lora.source)) for lora in model.loras)
    return model.model_copy(update=whole(model.source) | {"loras": loras})


def _explain(mistake: Any) -> str:
    where = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *parents, key = mistake["loc"]
        allowed = _keys_at(parents)
        close = difflib.get_close_matches(str(key), allowed, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
        return f"{where}: unknown key; {hint}"
    message = mistake["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" + (f", got {mistake['input']!r}" if isinstance(mistake["input"], str | int) else "")


def _keys_at(parents: list[str | int]) -> list[str]:
    """The keys that the schema allows inside the section at `parents`."""
    section: Any = DeploymentSpec
    for part in parents:
        if part == "models":
            section = ModelSpec
        elif isinstance(part, str):
            section = section.model_fields[part].annotation
    fields = getattr(section, "model_fields", None) or section.__dataclass_fields__
    return list(fields)
