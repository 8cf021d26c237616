"""The sections inside a model of a deployment file, from Defaults to Timeouts.

`deploy.model_spec.ModelSpec` is made of them; `workers` and `service` take those they need. Every field says what it
is, and its unit.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deploy.section import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Pixels = Annotated[int, Field(ge=16, le=8192)]
Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")]

NO_NUL = r"^[^\x00]*$"
"""The pattern of paths: the system's functions take no NUL."""


class Defaults(Section):
    """What a request gets for fields that it leaves out."""

    width: Pixels = Field(1024, description="pixels")
    height: Pixels = Field(1024, description="pixels")
    num_inference_steps: int = Field(50, ge=1, description="denoising steps")
    guidance_scale: float = Field(
        4.0, ge=0, le=30, description="strength of guidance; the value that turns it off depends on the model"
    )
    guidance_scale_2: float | None = Field(None, ge=0, le=30, description="for a second transformer; absent: the same")
    num_frames: int = Field(1, ge=1, description="frames of a video; 1 for pictures")
    fps: int = Field(16, ge=1, le=120, description="frames of a video per second")


class Limits(Section):
    """The most that a request may ask for."""

    max_width: Pixels = Field(2048, description="pixels")
    max_height: Pixels = Field(2048, description="pixels")
    size_multiple: int = Field(16, ge=1, description="width and height must be multiples of this many pixels")
    max_num_inference_steps: int = Field(100, ge=1, description="denoising steps")
    max_num_frames: int = Field(121, ge=1, description="frames of a video")
    max_n: int = Field(4, ge=1, le=10, description="pictures or videos per request")
    max_work: int | None = Field(
        None, ge=1, description="width x height x num_frames x num_inference_steps x n of one request; absent: no limit"
    )


class Autoscaling(Section):
    """How many gangs of a model run. Waiting work decides, in seconds, not in requests."""

    min_replicas: int = Field(
        1, ge=0, description="gangs that always run; 0 lets the model sleep until a request comes"
    )
    max_replicas: int = Field(1, ge=1, description="gangs that may run at once")
    target_backlog_seconds: float = Field(
        30.0, gt=0, description="seconds of work per gang above which more gangs start"
    )
    upscale_delay_s: float = Field(
        5.0, ge=0, description="seconds for which more gangs must be needed before they start"
    )
    downscale_delay_s: float = Field(300.0, ge=0, description="seconds for which fewer must be enough before one stops")
    downscale_to_zero_delay_s: float = Field(900.0, ge=0, description="the same for the last gang, in seconds")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, above max_replicas, {self.max_replicas}; change one"
            )
        return self


class Placement(Section):
    """What each gang of a model occupies, and where."""

    strategy: Literal["STRICT_PACK", "PACK"] = Field(
        "STRICT_PACK", description="all ranks on one node, or on as few nodes as possible"
    )
    accelerator_type: str | None = Field(
        None, description="only nodes with this GPU, by Ray's name for it, such as H100; absent: any"
    )
    node_labels: dict[str, str] = Field({}, description="only nodes with these Ray labels")
    cpus_per_rank: float = Field(1.0, gt=0, description="CPU cores that each rank reserves")
    network_interface: str | None = Field(
        None,
        min_length=1,
        description="over which ranks talk to each other, such as eth0; absent: the one of the address that Ray uses",
    )
    memory: int | None = Field(None, ge=1, description="bytes of main memory that each rank reserves; absent: none")


class WarmupShape(Section):
    """A size that runs once at start, so that no caller waits for what a first run prepares."""

    width: Pixels = Field(description="pixels")
    height: Pixels = Field(description="pixels")
    num_frames: int = Field(1, ge=1, description="frames of a video; 1 for a picture")


class LoRA(Section):
    """An adapter that requests may name."""

    name: Name = Field(description="the name that requests use")
    source: str = Field(pattern=NO_NUL, description="safetensors file; relative to the deployment file")
    component: Literal["transformer", "transformer_2"] = Field(
        "transformer", description="the transformer that it belongs to, if a model has two"
    )
    digest: Digest | None = Field(
        None, description="SHA-256 of the file, which must match; absent: that of the file that is deployed"
    )


class Elastic(Section):
    """Each request of a gang gets the ranks that it needs, step by step."""

    min_degree: int = Field(
        1, ge=1, description="ranks of a request at least, counted in tensor-parallel groups; a power of two"
    )


class Timeouts(Section):
    """How long a gang may take before it is replaced."""

    startup_s: float = Field(1800.0, gt=0, description="seconds for the start, rendezvous and loading of a gang")
    phase_s: float = Field(600.0, gt=0, description="seconds for one encode, one step or one decode")
    ping_s: float = Field(10.0, gt=0, description="seconds without an answer after which a rank counts as hung")
