"""The declared bodies of responses, for `/openapi.json`. `responses.py` fills them.

Keys that OpenAI's bodies do not have are added to them; OpenAI's client keeps them.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.model_sections import Defaults, Limits
from deploy.model_spec import Task
from service.state.model_states import State


class Answer(BaseModel):
    """A JSON object without keys that are not declared."""

    model_config = ConfigDict(extra="forbid")


class Error(Answer):
    """OpenAI's error object: a message for people, and a word for programs."""

    message: str = Field(description="what was given, what is allowed, what to change")
    type: str = Field(description="invalid_request_error, rate_limit_error or server_error")
    param: str | None = Field(description="the field that is wrong; null: no single one")
    code: str | None = Field(description="a stable word for programs")


class ErrorResponse(Answer):
    """The one form of every error, of every path."""

    error: Error


class Metrics(Answer):
    """The layout that computed a request, and the seconds of each stage on its first rank."""

    layout: str = Field(description="parallel degrees of the gang")
    encode_seconds: float
    step_seconds: list[float]
    decode_seconds: float
    encode_media_seconds: float = Field(description="of making the files, while the gang draws for the next caller")


class Generated(Answer):
    """One picture or video: its bytes, or where they are."""

    b64_json: str | None = Field(None, description="the file in base64; absent if a URL was asked for")
    url: str | None = Field(None, description="where the file is until `expires_at`; needs no key")
    expires_at: int | None = Field(None, description="of the URL, in seconds since the epoch")
    seed: int = Field(description="draws the same again")


class GenerationResponse(Answer):
    """OpenAI's ImagesResponse, for pictures and videos."""

    created: int = Field(description="seconds since the epoch")
    data: list[Generated]
    size: str = Field(description="WIDTHxHEIGHT")
    output_format: str
    background: Literal["opaque"]
    num_frames: int | None = Field(None, description="of a video")
    fps: int | None = Field(None, description="of a video")
    metrics: Metrics
    warnings: list[str] = Field(description="what a caller should know, such as that a prompt was cut")


class ModelObject(Answer):
    """OpenAI's Model; what follows `owned_by` is spray's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    aliases: list[str]
    tasks: list[Task] = Field(description="empty if it is not known yet; then it can be asked for anything")
    state: State
    reason: str = Field(description="why it does not run, or not as it should")
    eta_seconds: float | None = Field(description="until a typical request of now is answered; null: not known")
    layout: str
    loras: list[str]
    defaults: Defaults
    limits: Limits


class ModelList(Answer):
    """All models of the deployment, those that sleep or fail too."""

    object: Literal["list"]
    data: list[ModelObject]


class RequestObject(Answer):
    """A request that waits or runs."""

    id: str = Field(description="begins with the x-request-id that it came with, if it did")
    object: Literal["request"]
    model: str
    state: Literal["queued", "running"]
    position: int | None = Field(description="1 for the one that is served next; null: it does not wait, or not known")
    eta_seconds: float | None = Field(description="estimated seconds until it is drawn; null: not known")
    step: int = Field(description="denoising steps done")
    total_steps: int
    since: float = Field(description="when it was admitted, in seconds since the epoch")
    key: str | None = Field(description="the name of the API key that asked; null: none was needed")
    gateway: str = Field(description="the gateway that has it")


class RequestList(Answer):
    """All requests that wait or run, as far as the caller may see them; the oldest first."""

    object: Literal["list"]
    data: list[RequestObject]
    silent_gateways: list[str] = Field(description="gateways that did not answer in time; their requests are missing")


class CanceledRequest(Answer):
    """A request that ends within its current step."""

    id: str
    object: Literal["request.canceled"]
    canceled: Literal[True]


class VideoError(Answer):
    """Why a video was not made."""

    code: str = Field(description="a stable word for programs")
    message: str


class Video(Answer):
    """OpenAI's Video; what follows `size` is spray's."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="percent of the denoising steps; 100 when the video is there")
    created_at: int
    completed_at: int | None
    expires_at: int | None = Field(description="when the video and this record are removed; null: it has not ended")
    error: VideoError | None = Field(description="of a video that failed, was cancelled or missed its deadline")
    prompt: str
    remixed_from_video_id: str | None
    seconds: str
    size: str = Field(description="WIDTHxHEIGHT")
    seed: int
    num_frames: int
    fps: int
    priority: Literal["interactive", "standard", "batch"]
    position: int = Field(description="1 for the next of its model's jobs; 0: it does not wait, or was not asked")
    step: int = Field(description="denoising steps done by this attempt")
    total_steps: int
    attempt: int = Field(description="how often it was begun")
    metrics: Metrics | None
    warnings: list[str]


class VideoList(Answer):
    """Some videos."""

    object: Literal["list"]
    data: list[Video]
    has_more: bool
    first_id: str | None
    last_id: str | None


class VideoDeleted(Answer):
    """A video that is gone."""

    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class JobLoRA(Answer):
    """An adapter that a job uses."""

    name: str
    scale: float


class JobRequest(Answer):
    """What a job makes. All that was open when it was accepted is settled here."""

    prompt: str
    negative_prompt: str | None
    size: str = Field(description="WIDTHxHEIGHT")
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = Field(description="of a video model's second transformer")
    flow_shift: float | None
    strength: float | None = Field(description="share of the steps; of what begins with a picture or a clip")
    extra_params: dict[str, Any] = Field(description="of the model's pipeline alone")
    seeds: list[int] = Field(description="of each picture, or of the video")
    loras: list[JobLoRA]
    num_frames: int | None = Field(description="of a video")
    fps: int | None = Field(description="of a video")
    output_format: str
    embed_metadata: bool = Field(description="whether its files have these parameters in them")


class JobFile(Answer):
    """A finished file of a job, at its content by its index."""

    index: int
    output_format: str
    seed: int = Field(description="draws the same again")
    bytes: int
    sha256: str


class JobError(Answer):
    """Why a job did not succeed."""

    code: str = Field(description="a stable word for programs")
    message: str
    param: str | None = Field(description="the field that is wrong; null: no single one")


class JobObject(Answer):
    """A job: a request that is kept until it has ended."""

    id: str
    object: Literal["job"]
    kind: Literal["image", "video"]
    model: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]
    progress: int = Field(description="percent of the denoising steps; 100 when the files are there")
    position: int = Field(description="1 for the next of its model's jobs; 0: it does not wait, or was not asked")
    step: int = Field(description="denoising steps done by this attempt")
    total_steps: int
    attempt: int = Field(description="how often it was begun")
    priority: Literal["interactive", "standard", "batch"]
    created_at: float = Field(description="seconds since the epoch, as all of these")
    started_at: float | None = Field(description="of the last attempt")
    ended_at: float | None
    deadline_at: float | None = Field(description="when it expires if it has not ended")
    expires_at: float | None = Field(description="when this record and its files are removed; null: it has not ended")
    error: JobError | None
    request: JobRequest
    outputs: list[JobFile] = Field(description="empty until it has succeeded")
    metrics: Metrics | None
    warnings: list[str]


class JobList(Answer):
    """Some jobs."""

    object: Literal["list"]
    data: list[JobObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class JobDeleted(Answer):
    """A job that is gone."""

    id: str
    object: Literal["job.deleted"]
    deleted: Literal[True]


class Alive(Answer):
    """The gateway's process answers, whatever its models do."""

    status: Literal["ok"]


class Ready(Answer):
    """Whether requests should come here."""

    status: Literal["ok", "waiting", "draining"]
    waiting_for: list[str] = Field(description="models that neither run nor sleep")
    in_flight: int = Field(description="requests in this gateway")
    gateway: str = Field(description="which of several gateways answers")
    instance_id: str = Field(description="of the deployment; another server at this address has another")


class ClusterObject(BaseModel):
    """Nodes, devices and gangs; see `GET /v1/cluster` in service/README.md."""

    model_config = ConfigDict(extra="allow")

    object: Literal["cluster"]
    nodes: int | None = None
    devices: dict[str, Any] | None = None
    models: list[dict[str, Any]] | None = None
