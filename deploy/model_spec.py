"""One model of a deployment file: where its weights are, how its gangs look, what requests may ask of it.

`deploy.spec` reads it as one of a deployment's models. The frozen object goes to `service.app` (what to deploy),
`workers.gang.placement` (what a gang occupies) and `workers.gang.rank` (what to load).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from deploy.model_sections import (
    NO_NUL,
    Autoscaling,
    Defaults,
    Digest,
    Elastic,
    Limits,
    LoRA,
    Name,
    Placement,
    Timeouts,
    WarmupShape,
)
from deploy.section import Section
from sp_core.degrees import ParallelDegrees, smaller_layouts

Symbol = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
Task = Literal[
    "text-to-image",
    "text-to-video",
    "image-to-image",
    "inpaint",
    "edit",
    "control",
    "image-to-video",
    "first-last-frame-to-video",
    "video-to-video",
]

LIVE = frozenset(
    {
        "aliases",
        "tasks",
        "loras",
        "defaults",
        "limits",
        "autoscaling",
        "grace_period_s",
        "max_queued",
        "max_queued_s",
        "self_test",
    }
)
"""Keys of a model that change while its gangs run. A change of any other key starts new gangs."""


class ModelSpec(Section):
    """One model: where its weights are and how its gangs look."""

    name: Name = Field(description="the name that requests use")
    source: str = Field(
        pattern=NO_NUL,
        description="model folder in diffusers' format, relative to the deployment file, or a hub id (org/name)",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; absent: its main branch")
    digest: Digest | None = Field(
        None,
        description="of the model's files: a SHA-256, or the commit of a hub id; absent: as they are when deployed",
    )
    aliases: tuple[Name, ...] = Field((), description="other names that requests may use")
    tasks: tuple[Task, ...] | None = Field(
        None, description="what requests may ask for; absent: everything that it can do"
    )
    device: Literal["cuda", "cpu"] = Field("cuda", description="one device per rank")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="of weights and activations; default bfloat16 on cuda, float32 on cpu"
    )
    parallel: ParallelDegrees = Field(ParallelDegrees(), description="degrees of one gang: ranks per axis")
    elastic: Elastic | None = Field(
        None,
        description="a gang runs several requests side by side, each on as many ranks as it needs, which may change "
        "after every step; absent: each request has all ranks",
    )
    vae_dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="of the VAE; absent: float32 if the family's authors decode in it, else dtype"
    )
    attention_kernel: (
        Literal["torch-flash", "torch-cudnn", "torch-efficient", "flash-attn-2", "flash-attn-3"] | None
    ) = Field(
        None, description="of attention without a mask on cuda; absent: the fastest on the first rank, when it starts"
    )
    compile: bool = Field(False, description="compile the transformer's blocks; needs warmup_shapes")
    cuda_graphs: bool = Field(
        False,
        description="record compiled blocks as CUDA graphs, all but attention; needs compile, a GPU for each rank and "
        "tensor_parallel_size 1. Not yet run on a GPU",
    )
    warmup_shapes: tuple[WarmupShape, ...] = Field((), description="sizes that run once at start")
    text_encoder: Literal["rank0", "replicate"] = Field(
        "rank0",
        description="which ranks hold the text encoders: the first, which sends its embeddings to the others, or all",
    )
    vae: Literal["rank0", "all"] = Field(
        "all", description="which ranks hold the VAE: the first, or all, to share pictures and large outputs' tiles"
    )
    vae_tiling_above: int = Field(
        2048 * 2048, ge=0, description="width x height x frames above which the VAE decodes in tiles"
    )
    batch_guidance: bool | Literal["auto"] = Field(
        "auto",
        description="both branches of guidance in one forward where their prompts are of one length: true, false, or "
        "auto, which does it for small requests",
    )
    self_test: bool = Field(
        True,
        description="before a gang of several ranks serves, compare what it computes with what one rank computes",
    )
    spare_ranks: bool = Field(
        False,
        description="beside each rank, keep a process with its libraries imported that takes its place when ranks are "
        "lost; about 350 MB of a node's memory each",
    )
    loras: tuple[LoRA, ...] = Field((), description="adapters that requests may name")
    plan: Symbol | None = Field(
        None, description="package.module:NAME of a sequence-parallel plan; absent: spray's own for the class"
    )
    transformer_class: Symbol | None = Field(
        None, description="package.module:NAME of the transformer's class; absent: what its config.json says"
    )
    env: dict[str, str] = Field({}, description="environment variables of the ranks")
    defaults: Defaults = Field(Defaults(), description="what a request gets for fields that it leaves out")
    limits: Limits = Field(Limits(), description="the most that a request may ask for")
    autoscaling: Autoscaling = Field(Autoscaling(), description="how many gangs run")
    placement: Placement = Field(Placement(), description="what each gang occupies, and where")
    timeouts: Timeouts = Field(Timeouts(), description="how long a gang may take before it is replaced")
    grace_period_s: float = Field(
        900.0, gt=0, description="seconds that a stopping gang may take to finish its request"
    )
    max_queued: int = Field(
        64, ge=1, description="requests that may wait for this model in each gateway, jobs not counted; then 429"
    )
    max_queued_s: float | None = Field(
        600.0, gt=0, description="longest expected wait in seconds, then 429; OpenAI's clients wait 600; null: any"
    )

    @field_validator("parallel", mode="before")
    @classmethod
    def _degrees_are_whole(cls, value: Any) -> Any:
        for name, degree in value.items() if isinstance(value, dict) else ():
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
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
                raise ValueError(f"defaults.{name} is {default}, above limits.max_{name}, {limit}; change one")
        for name, default, _ in pairs[:2]:
            if default % self.limits.size_multiple:
                raise ValueError(f"defaults.{name} is {default}, not a multiple of {self.limits.size_multiple}")
        # As service.api.schemas counts a request, of one picture or video.
        work = self.defaults.width * self.defaults.height * self.defaults.num_frames * self.defaults.num_inference_steps
        if self.limits.max_work is not None and work > self.limits.max_work:
            raise ValueError(
                f"a request that leaves all to defaults has width x height x num_frames x num_inference_steps {work}, "
                f"above limits.max_work, {self.limits.max_work}; change one"
            )
        return self

    @model_validator(mode="after")
    def _kernel_is_for_cuda(self) -> Self:
        if self.attention_kernel and self.device == "cpu":
            raise ValueError(f"attention_kernel is {self.attention_kernel}, but device is cpu; leave one of them out")
        return self

    @model_validator(mode="after")
    def _graphs_can_be_recorded(self) -> Self:
        reasons = {
            "compile is false; set it": not self.compile,
            "device is cpu; leave cuda_graphs out": self.device == "cpu",
            # Sums between ranks would be recorded too, and a rank that replays alone waits forever.
            "tensor_parallel_size is above 1; use ulysses_degree or ring_degree": (
                self.parallel.tensor_parallel_size > 1
            ),
        }
        for reason, holds in reasons.items():
            if self.cuda_graphs and holds:
                raise ValueError(f"cuda_graphs is true, but {reason}")
        return self

    @model_validator(mode="after")
    def _branches_are_batched_or_on_groups(self) -> Self:
        groups = self.parallel.cfg_parallel_size
        if self.batch_guidance is True and groups > 1:
            raise ValueError(
                f"batch_guidance is true, but parallel.cfg_parallel_size is {groups}, which gives each branch ranks of "
                "its own; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _gang_can_be_elastic(self) -> Self:
        if self.elastic is None:
            return self
        smaller_layouts(self.parallel, self.elastic.min_degree)
        if self.vae == "rank0":
            raise ValueError("elastic needs the VAE on every rank, and vae is rank0; leave vae out")
        if self.cuda_graphs:
            raise ValueError("elastic gangs cannot record CUDA graphs yet; leave cuda_graphs or elastic out")
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
                raise ValueError(f"warmup_shapes.{i} is {shape.width}x{shape.height}, above the limits; change one")
            if shape.width % limits.size_multiple or shape.height % limits.size_multiple:
                raise ValueError(f"warmup_shapes.{i} is not a multiple of {limits.size_multiple} pixels")
            if shape.num_frames > limits.max_num_frames:
                raise ValueError(f"warmup_shapes.{i}.num_frames is above limits.max_num_frames; change one")
        if self.compile and not self.warmup_shapes:
            raise ValueError("compile needs warmup_shapes, or the first callers would wait for the compiler")
        return self

    @property
    def from_hub(self) -> bool:
        """True if `source` is a hub id, not a folder."""
        return not self.source.startswith("/")

    @property
    def fixed(self) -> dict[str, Any]:
        """The keys that cannot change while a gang runs, as JSON."""
        return self.model_dump(mode="json", exclude=set(LIVE))

    @property
    def live(self) -> dict[str, Any]:
        """The keys that change while gangs run, as JSON. `fixed` and `live` together are the whole model."""
        return self.model_dump(mode="json", include=set(LIVE))

    @property
    def torch_dtype(self) -> str:
        """The name of the torch dtype to load."""
        return self.dtype or ("bfloat16" if self.device == "cuda" else "float32")
