"""The schema of a deployment file: DeploymentSpec > ModelSpec > Defaults, Limits, Autoscaling, Placement, ...

YAML comes in through `deploy.load`; the frozen objects go to `service.app` (what to deploy), `workers.gang.placement`
(what a gang occupies) and `workers.gang.rank` (what to load). Unknown keys are errors. Every field says what it is, and
its unit.
"""

import ipaddress
import itertools
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sp_core.degrees import ParallelDegrees, smaller_layouts

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Pixels = Annotated[int, Field(ge=16, le=8192)]
Symbol = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")]
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

NO_NUL = r"^[^\x00]*$"
"""Of paths: the system's functions take no NUL."""

LIVE = frozenset(
    {"aliases", "tasks", "loras", "defaults", "limits", "autoscaling", "grace_period_s", "max_queued", "max_queued_s"}
    | {"self_test"}
)
"""Keys of a model that change while its gangs run. A change of any other key starts new gangs."""


def is_loopback(host: str) -> bool:
    """True for a name or an address of the machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


ORIGIN = re.compile(r"https?://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
HOST = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)*\.[a-z][a-z0-9-]*(:[0-9]{1,5})?")
"""A name, not an address."""
WEBHOOK_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:]+")
STANDARD_PORT = {"http:": ":80", "https": ":443"}
"""Browsers leave it out, by the first letters of the origin."""


class SpecError(ValueError):
    """A deployment file cannot be used. The message has one line per mistake."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Defaults(_Section):
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


class Limits(_Section):
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


class Autoscaling(_Section):
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


class Placement(_Section):
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


class WarmupShape(_Section):
    """A size that runs once at start, so that no caller waits for what a first run prepares."""

    width: Pixels = Field(description="pixels")
    height: Pixels = Field(description="pixels")
    num_frames: int = Field(1, ge=1, description="frames of a video; 1 for a picture")


class LoRA(_Section):
    """An adapter that requests may name."""

    name: Name = Field(description="the name that requests use")
    source: str = Field(pattern=NO_NUL, description="safetensors file; relative to the deployment file")
    component: Literal["transformer", "transformer_2"] = Field(
        "transformer", description="the transformer that it belongs to, if a model has two"
    )
    digest: Digest | None = Field(
        None, description="SHA-256 of the file, which must match; absent: that of the file that is deployed"
    )


class Elastic(_Section):
    """Each request of a gang gets the ranks that it needs, step by step."""

    min_degree: int = Field(
        1, ge=1, description="ranks of a request at least, counted in tensor-parallel groups; a power of two"
    )


class Timeouts(_Section):
    """How long a gang may take before it is replaced."""

    startup_s: float = Field(1800.0, gt=0, description="seconds for the start, rendezvous and loading of a gang")
    phase_s: float = Field(600.0, gt=0, description="seconds for one encode, one step or one decode")
    ping_s: float = Field(10.0, gt=0, description="seconds without an answer after which a rank counts as hung")


class ModelSpec(_Section):
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
    attention_kernel: Literal["torch-flash", "torch-cudnn", "flash-attn-2", "flash-attn-3"] | None = Field(
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
        "lost; about 0.4 GB of a node's memory each",
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
    max_queued: int = Field(64, ge=1, description="requests that may wait for this model in each gateway; then 429")
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
            # Sums between ranks would be recorded too, and whoever replays alone waits for ever.
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
        """What a gang cannot change while it runs, as JSON."""
        return self.model_dump(mode="json", exclude=set(LIVE))

    @property
    def live(self) -> dict[str, Any]:
        """What changes while gangs run, as JSON. `fixed` and `live` together are the whole model."""
        return self.model_dump(mode="json", include=set(LIVE))

    @property
    def torch_dtype(self) -> str:
        """The name of the torch dtype to load."""
        return self.dtype or ("bfloat16" if self.device == "cuda" else "float32")


class GatewaySpec(_Section):
    """Where clients reach the deployment."""

    host: str = Field("127.0.0.1", description="address to bind")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one")
    grpc_port: int | None = Field(
        9000, ge=0, le=65535, description="gRPC port; 0 takes a free one, on a local cluster only; null: no gRPC"
    )
    replicas: int = Field(1, ge=1, description="gateway processes; two or more survive the loss of one")
    node_labels: dict[str, str] = Field({}, description="gateways run only on nodes with these Ray labels; absent: any")
    cors_origins: tuple[str, ...] = Field(
        (),
        description="sites whose pages may call the API from a browser, such as https://app.example.com; "
        "*: all, only where callers need a key",
    )

    media_hosts: tuple[str, ...] = Field(
        (),
        description="hosts from which pictures are fetched, over https, where a request names them by URL, such as "
        "images.example.com; absent: none",
    )
    webhook_hosts: tuple[str, ...] = Field(
        (),
        description="hosts that jobs may name in webhook_url to tell of their end, as hooks.example.com; empty: none",
    )
    webhook_key_env: str | None = Field(
        None,
        description="environment variable of the gateway with the key that signs webhooks, whsec_ and base64; several, "
        "with spaces between them, all sign",
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="of the line that is logged for each request: key=value, or an object of JSON"
    )
    log_prompts: bool = Field(False, description="log prompts too")

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not (ORIGIN.fullmatch(origin) and not origin.endswith(STANDARD_PORT[origin[:5]])):
                raise ValueError(
                    f"{origin!r} is not what a browser sends as an origin: http:// or https://, a host in lower case, "
                    "its port unless that is 80 or 443, and no path; such as https://app.example.com"
                )
        return origins

    @field_validator("media_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not HOST.fullmatch(host) or host.endswith(":443"):
                raise ValueError(
                    f"{host!r} is no name of a host in lower case, with its port unless that is 443, such as "
                    "images.example.com"
                )
        return hosts

    @field_validator("webhook_hosts")
    @classmethod
    def _are_hosts_to_call(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not WEBHOOK_HOST.fullmatch(host):
                raise ValueError(f"{host!r} is no host; name it in lower case, without a scheme, port, path or *")
        return hosts

    @model_validator(mode="after")
    def _webhooks_are_signed(self) -> Self:
        if self.webhook_hosts and self.webhook_key_env is None:
            raise ValueError("webhook_hosts needs webhook_key_env, the variable with the key that signs webhooks")
        return self


class GatewayLimits(_Section):
    """Limits of any request to the gateway."""

    max_body_bytes: int = Field(
        32 << 20, ge=1024, description="bytes of a request's body; one without pictures has 1 MiB at most"
    )


class Metrics(_Section):
    """What Prometheus reads, from each node separately."""

    host: str | None = Field(None, description="address to bind on each node; absent: the gateway's")
    port: int | None = Field(
        9464,
        ge=0,
        le=65535,
        description="port of each node for GET /metrics; 0 takes a free one, on a local cluster only; null: no metrics",
    )


class Outputs(_Section):
    """Finished pictures and videos, for answers that hold their URL."""

    folder: str | None = Field(
        None,
        pattern=r"^/[^\x00]*$",
        description="absolute; shared by all nodes that a gateway may run on; absent: one of each node and cluster",
    )
    url: str | None = Field(
        None,
        pattern=r"^s3://[a-z0-9][a-z0-9.-]+(/[A-Za-z0-9._-]+)*$",
        description="s3://BUCKET/PREFIX, instead of a folder; variables of the gateway, AWS_..., have the credentials",
    )
    ttl_s: float = Field(3600.0, gt=0, le=31_536_000, description="seconds for which a URL is valid and its file kept")
    max_bytes: int | None = Field(
        None, ge=1 << 20, description="bytes of all files, above which nothing more is begun; absent: as the disk has"
    )

    @model_validator(mode="after")
    def _are_in_one_place(self) -> Self:
        if self.folder is not None and self.url is not None:
            raise ValueError(f"folder is {self.folder} and url is {self.url}; leave one of them out")
        return self


class Idempotency(_Section):
    """Answers of requests with an idempotency key, for callers that ask again with the same key."""

    folder: str | None = Field(
        None,
        pattern=r"^/[^\x00]*$",
        description="absolute, on a local disk of the head's node; absent: one that ends with the cluster",
    )
    ttl_s: float = Field(86_400.0, gt=0, le=31_536_000, description="seconds for which a key is known")
    max_bytes: int = Field(
        4 << 30,
        ge=1 << 20,
        description="bytes of all answers; beyond, the oldest is drawn again with its seed when its key comes again",
    )


class Storage(_Section):
    """Where each node keeps files."""

    models: str | None = Field(
        None, description="folder for models from the hub, on every node; absent: Hugging Face's own cache"
    )
    compiled: str | None = Field(
        None, description="folder for compiled blocks, on every node; absent: a private one among temporary files"
    )
    outputs: Outputs = Field(Outputs(), description="finished pictures and videos, for answers that hold their URL")
    idempotency: Idempotency = Field(Idempotency(), description="answers of requests with an idempotency key")
    jobs: str | None = Field(
        None,
        pattern=r"^/[^\x00]*$",
        description="absolute folder of jobs on a local disk of the head's node; absent: jobs end with the cluster",
    )
    jobs_url_env: str | None = Field(
        None,
        description="environment variable of the gateway with the URL of a PostgreSQL database that keeps jobs",
    )

    @model_validator(mode="after")
    def _jobs_are_in_one_place(self) -> Self:
        if self.jobs is not None and self.jobs_url_env is not None:
            raise ValueError(f"jobs is {self.jobs} and jobs_url_env is {self.jobs_url_env}; leave one of them out")
        return self


class Auth(_Section):
    """Who may call."""

    api_keys_env: str | None = Field(
        None, description="environment variable of the gateway with comma-separated API keys, which may do everything"
    )
    api_keys_file: str | None = Field(
        None, description="file of API keys on the gateway's nodes, each with its limits; read again when it changes"
    )
    insecure: bool = Field(
        False, description="let anybody call who reaches gateway.host, though it is not this machine alone"
    )

    @property
    def needs_key(self) -> bool:
        """Whether callers need an API key."""
        return self.api_keys_env is not None or self.api_keys_file is not None


class Tracing(_Section):
    """Traces of requests, for an OpenTelemetry collector."""

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        description="URL of the collector for OTLP over HTTP, such as http://127.0.0.1:4318, without /v1/traces; "
        "absent: no traces",
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="share of requests that are traced, where the caller has not decided it"
    )


class DeploymentSpec(_Section):
    """A whole deployment file."""

    models: tuple[ModelSpec, ...] = Field(
        description="what is served; each model can be added, changed and removed alone"
    )
    gateway: GatewaySpec = Field(GatewaySpec(), description="where clients reach the deployment")
    limits: GatewayLimits = Field(GatewayLimits(), description="limits of any request to the gateway")
    metrics: Metrics = Field(Metrics(), description="what Prometheus reads, from each node separately")
    tracing: Tracing = Field(Tracing(), description="traces of requests, for an OpenTelemetry collector")
    storage: Storage = Field(Storage(), description="where each node keeps files")
    auth: Auth = Field(Auth(), description="who may call")

    @property
    def metrics_at(self) -> dict[str, Any]:
        """Where each node answers Prometheus: `{"host": ..., "port": ... or None}`."""
        return {"host": self.metrics.host or self.gateway.host, "port": self.metrics.port}

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = {
            "metrics.port": self.metrics.port,
            "gateway.port": self.gateway.port,
            "gateway.grpc_port": self.gateway.grpc_port,
        }
        for (one, port), (other, same) in itertools.combinations(ports.items(), 2):
            if port and port == same:
                raise ValueError(f"{one} and {other} are both {port}; change one")
        return self

    @model_validator(mode="after")
    def _is_closed(self) -> Self:
        if not (self.auth.needs_key or self.auth.insecure or is_loopback(self.gateway.host)):
            raise ValueError(
                f"gateway.host is {self.gateway.host}, where other machines may call, and nobody needs a key; set "
                "auth.api_keys_env or auth.api_keys_file, or allow it with auth.insecure: true"
            )
        return self

    @model_validator(mode="after")
    def _pages_need_a_key(self) -> Self:
        if "*" in self.gateway.cors_origins and not self.auth.needs_key:
            raise ValueError(
                "gateway.cors_origins is *, so that every page in a browser may call, and nobody needs a key; name the "
                "sites, or set auth.api_keys_env or auth.api_keys_file"
            )
        return self

    @field_validator("models")
    @classmethod
    def _names_are_unique(cls, models: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
        if not models:
            raise ValueError("at least one model is needed")
        taken: set[str] = set()
        for name in (name for model in models for name in (model.name, *model.aliases)):
            if name in taken:
                raise ValueError(f"two models are called {name!r}; give each its own names")
            taken.add(name)
        return models
