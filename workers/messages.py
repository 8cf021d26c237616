"""The messages that cross a process boundary: frozen, picklable, without torch.

gateway -> gang -> rank    GenerationRequest
gang -> gateway            Begun, when the request has the ranks
rank -> gang -> gateway    StepEvent after each step, and Preview after some, if asked for
gang -> rank               Part, in an elastic gang; Kept comes back at its end or in between
rank -> gang -> gateway    Profiled, from each rank, if asked for
rank -> gang               Drawn, when the ranks are free for the next request; Traced, during a traced request
gang -> gateway            Answer, through which GenerationResult comes straight from rank 0
"""

import hashlib
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sp_core.degrees import ParallelDegrees
from workers.tracing import Event

ImageFormat = Literal["png", "jpeg", "webp"]
OutputFormat = ImageFormat | Literal["mp4"]
PreviewDecoder = Literal["linear", "vae"]
MediaRole = Literal["image", "mask", "last_image", "control_image", "video"]
Priority = Literal["interactive", "standard", "batch"]
Phase = Literal["starting", "idle", "load", "encode", "denoise", "decode", "encode_media"]


PREVIEW_EDGE = 512
"""Pixels of a preview's longer edge, unless the request says otherwise."""

LEAST_STEPS_APART = 3
"""Steps between two previews at least: a preview takes 6 ms of a CPU, which is 2 % of three steps of 100 ms."""

MOST_BY_VAE = 3
"""The most previews of a request by the VAE, each of which takes as long as decoding the picture."""


@dataclass(frozen=True)
class PreviewOptions:
    """The previews to report: of the first picture, or of the middle frame of a video.

    Attributes:
        count: the number of previews, spread evenly over the steps.
        every: steps between two previews instead, at least `LEAST_STEPS_APART`; 0: `count` decides.
        decoder: `linear`, by a linear map from the latents to colors; `vae`, by the model's VAE, at most `MOST_BY_VAE`.
        max_edge: the most pixels of the longer edge.
    """

    count: int = 0
    every: int = 0
    decoder: PreviewDecoder = "linear"
    max_edge: int = PREVIEW_EDGE

    def steps(self, total_steps: int) -> tuple[int, ...]:
        """The steps after which a preview is made, 1 for the first. Never the last: the picture itself follows it."""
        apart = max(self.every, LEAST_STEPS_APART)
        count = len(range(apart, total_steps, apart)) if self.every else self.count
        if self.every and not (self.decoder == "vae" and count > MOST_BY_VAE):
            return tuple(range(apart, total_steps, apart))
        count = min(count, MOST_BY_VAE) if self.decoder == "vae" else count
        spread = (round(total_steps * (i + 1) / (count + 1)) for i in range(count))
        return tuple(dict.fromkeys(step for step in spread if 0 < step < total_steps))


@dataclass(frozen=True)
class MediaInput:
    """A picture or a clip that a request starts from.

    Attributes:
        role: `image`, to change, or to begin a video with; `mask`, white where to draw anew, black where to keep;
            `last_image`, to end a video with; `control_image`, to follow, such as edges; `video`, a clip.
        data: a PNG without transparency: gray for a mask, animated for a clip, else in color. Empty on ranks that do
            not need it.
    """

    role: MediaRole
    data: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        """The SHA-256 of the picture, in hexadecimal. It stands for the bytes in records and fingerprints."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class GenerationRequest:
    """One accepted request. Everything random is settled, so that running it twice gives the same picture.

    Attributes:
        request_id: unique; used in logs and for canceling.
        model: name of the model in the deployment.
        prompt: what to draw.
        negative_prompt: what not to draw; None turns guidance off if the model's own pipeline does so.
        width: pixels.
        height: pixels.
        num_inference_steps: denoising steps.
        guidance_scale: strength of guidance.
        guidance_scale_2: for a model's second transformer; None: the same.
        loras: adapters by name, each with its scale.
        num_frames: of a video; 1 for pictures.
        fps: frames of a video per second.
        seed: the seed of the first picture or video; number i uses seed + i, unless `seeds` says otherwise.
        n: the number of pictures or videos.
        output_format: of the encoded files.
        output_compression: JPEG and WebP quality, 0 to 100.
        report_steps: whether to send a `StepEvent` per step; each is a message through all layers.
        seed_drawn: whether the seed was drawn here, so that the same body sent again gets another one.
        frames_chosen: whether `num_frames` was chosen here, so that the ranks may lower it to what the model makes.
        priority: which request an elastic gang prefers; a job has its own priority.
        deadline_at: when the answer becomes worthless, in seconds since the epoch; None: never. The gateway enforces
            it.
        seeds: a seed for each picture or video; empty: they follow from `seed`.
        true_cfg: whether the guidance scale is meant for two branches; a model with one branch refuses it.
        flow_shift: the shift of the noise schedule; None: the model's own.
        previews: the previews to report; None: none.
        extra_params: parameters of the model's pipeline alone, by name; plain JSON values.
        inputs: pictures and clips to begin with: at most one of each role, except `image`; a mask only with an image.
        strength: strength of the change to `inputs`, 0.01 to 1; 1 keeps nothing. It is the share of the steps to do.
            None: the family's default.
        traceparent: the parent span of the work on the request, in W3C's format; empty: it is not traced.
        profile: whether each rank reports a `Profiled` of its steps.
        embed_metadata: whether the files have the parameters that made them.
    """

    request_id: str
    model: str
    prompt: str
    width: int
    height: int
    num_inference_steps: int
    seed: int
    negative_prompt: str | None = None
    guidance_scale: float = 4.0
    guidance_scale_2: float | None = None
    loras: tuple[tuple[str, float], ...] = ()
    num_frames: int = 1
    fps: int = 16
    n: int = 1
    output_format: OutputFormat = "png"
    output_compression: int = 100
    report_steps: bool = False
    seed_drawn: bool = False
    priority: Priority = "interactive"
    deadline_at: float | None = None
    seeds: tuple[int, ...] = ()
    true_cfg: bool = False
    flow_shift: float | None = None
    previews: PreviewOptions | None = None
    extra_params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    inputs: tuple[MediaInput, ...] = ()
    strength: float | None = None
    traceparent: str = ""
    profile: bool = False
    embed_metadata: bool = True
    frames_chosen: bool = False

    def input(self, role: MediaRole) -> MediaInput | None:
        """The first input of a role; None if there is none."""
        return next((each for each in self.inputs if each.role == role), None)

    def without_data(self) -> "GenerationRequest":
        """The same request without the data of its inputs, for ranks that do not read them."""
        return replace(self, inputs=tuple(replace(each, data=b"") for each in self.inputs)) if self.inputs else self

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seed of each picture or video."""
        return self.seeds or tuple(self.seed + i for i in range(self.n))

    @property
    def steps_asked(self) -> float:
        """Steps that it asks for, before the scheduler changes them; with input pictures, the share to do."""
        share = self.strength if self.inputs and self.strength is not None else 1.0
        return max(1.0, self.num_inference_steps * share)

    @property
    def work(self) -> int:
        """Pixels x frames x steps x pictures, the unit of limits and fair shares."""
        return self.width * self.height * self.num_frames * self.num_inference_steps * self.n


@dataclass(frozen=True)
class Begun:
    """The request has the ranks to itself. If the gang is lost from now on, the request may be the cause."""


@dataclass(frozen=True)
class StepEvent:
    """One denoising step is done.

    Attributes:
        step: 1 for the first.
        total_steps: steps of the request.
        seconds: from the end of the step before to the end of this one, on rank 0's device.
    """

    step: int
    total_steps: int
    seconds: float


@dataclass(frozen=True)
class Preview:
    """How the picture will look, as far as the model can tell after a step.

    Attributes:
        index: 0 for the first of the request.
        step: the step after which it was made.
        data: a JPEG.
    """

    index: int
    step: int
    data: bytes


@dataclass(frozen=True)
class GenerationResult:
    """The pictures or videos of a request, and what they took.

    Attributes:
        outputs: encoded pictures or videos.
        seeds: the seed of each.
        degrees: the layout of the gang.
        encode_seconds: wall time of prompt encoding and preparation on rank 0.
        step_seconds: seconds of each step, from the end of the previous one to its own, on rank 0's device.
        decode_seconds: wall time of decoding the latents to pictures, on rank 0.
        warnings: what the caller should know, such as that a prompt was cut.
        encode_media_seconds: wall time of encoding the pictures as files, on rank 0. The ranks have begun the next
            request meanwhile.
        created_at: when it was first answered, in seconds since the epoch; 0: now.
    """

    outputs: tuple[bytes, ...]
    seeds: tuple[int, ...]
    degrees: ParallelDegrees
    encode_seconds: float
    step_seconds: tuple[float, ...]
    decode_seconds: float
    warnings: tuple[str, ...] = ()
    encode_media_seconds: float = 0.0
    created_at: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall time of all stages on rank 0."""
        return self.encode_seconds + sum(self.step_seconds) + self.decode_seconds + self.encode_media_seconds


@dataclass(frozen=True)
class Drawn:
    """The pictures are decoded, and wait on rank 0 to be encoded. The ranks are free.

    Attributes:
        request_id: the id of the request.
        took: its result, still without outputs.
    """

    request_id: str
    took: GenerationResult


@dataclass(frozen=True)
class Operator:
    """The time of one operator in all steps of a profile, without the operators that it called.

    Attributes:
        name: torch's name of it.
        calls: the number of its calls.
        host_seconds: seconds on the CPU.
        device_seconds: seconds on the GPU; 0 without one.
    """

    name: str
    calls: int
    host_seconds: float
    device_seconds: float


@dataclass(frozen=True)
class Profiled:
    """The steps of one request on one rank, as torch's profiler saw them.

    Attributes:
        rank: its number.
        trace: Chrome's trace format, as gzipped JSON.
        operators: the operators that took longest, the longest first; by GPU time if there is a GPU.
        steps: the number of steps.
        seconds: seconds of all steps.
        communication_seconds: the part of these in collectives.
        waiting_seconds: the part of those spent waiting for slower ranks.
    """

    rank: int
    trace: bytes = field(repr=False)
    operators: tuple[Operator, ...]
    steps: int
    seconds: float
    communication_seconds: float
    waiting_seconds: float


@dataclass(frozen=True)
class Traced:
    """The marks of one rank for a traced request since its last report.

    Attributes:
        marks: `begin`; a stage, by its name, when it begins; `step`, when one has ended; `end`.
    """

    marks: tuple[Event, ...]


@dataclass(frozen=True)
class Part:
    """Some steps of a request of an elastic gang, on some of its ranks.

    Attributes:
        request: the request.
        number: the number of the part, 1 for the first of the request.
        ranks: the number of its ranks.
        encoded: its encoded prompts, as the encoding rank has returned them.
        progress: its progress so far; empty at the beginning.
    """

    request: GenerationRequest
    number: int
    ranks: int
    encoded: bytes = field(repr=False)
    progress: bytes = field(repr=False, default=b"")


@dataclass(frozen=True)
class Kept:
    """The progress of a request of an elastic gang, from which any ranks of the gang can resume it.

    Attributes:
        steps_done: steps of its scheduler.
        progress: for `Part.progress`.
        pauses: whether its ranks have left it. If not, they go on, and this is kept in case they are lost.
    """

    steps_done: int
    progress: bytes = field(repr=False)
    pauses: bool


@dataclass(frozen=True)
class Answer:
    """The request has left the ranks; rank 0 encodes its pictures while they compute the next.

    Attributes:
        result: a reference to await in the same cluster. It raises the error of the encoding, or Ray's error if the
            rank or the gang ends before; then the request can run again.
    """

    result: Awaitable[GenerationResult]


@dataclass(frozen=True)
class RankStatus:
    """The answer of a rank to a ping, also while it computes.

    Attributes:
        rank: its number in the gang.
        pid: its process.
        node_id: the Ray node it runs on; empty outside Ray.
        phase: its current phase; never `encode_media`, which runs beside all others.
        progress: grows with every boundary that it passes; if it stands still for too long, the rank hangs.
        model: the name of its model.
        loaded: the share of the model's files that it has read, from 0 to 1.
        step: denoising steps done of its current or last request.
        total_steps: all steps of that request; 0 until its scheduler has set them. A scheduler of second order takes
            more than `num_inference_steps`.
        kernel: the attention kernel; empty until the model is loaded.
        guidance: how the latest guided request evaluated its branches: in one forward, or in two and why; empty before
            the first.
        start: the seconds of each phase of the start; only in the answer to `join`.
        latest_step: the latest step with timed collectives: its seconds, those in collectives, and those of waiting for
            slower ranks; empty before the first.
    """

    rank: int
    pid: int
    node_id: str
    phase: Phase
    progress: int
    model: str
    loaded: float
    step: int
    total_steps: int = 0
    kernel: str = ""
    guidance: str = ""
    start: tuple[tuple[str, float], ...] = ()
    latest_step: tuple[float, ...] = ()
