"""What crosses a process boundary: frozen, picklable, without torch.

gateway -> gang -> rank    GenerationRequest
gang -> gateway            Begun, when the request has the ranks
rank -> gang -> gateway    StepEvent after each step, and Preview after some, if asked for
gang -> rank               Part, in an elastic gang, which gets Kept at its end or in between
rank -> gang -> gateway    Profiled, from each rank, if asked for
rank -> gang               Drawn, when the ranks are free for the next request; Traced, as a traced request goes on
gang -> gateway            Answer, of which one GenerationResult comes, straight from rank 0
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
"""Of previews that are asked for by steps: a preview takes 6 ms of a CPU, which is 2 % of three steps of 100 ms."""

MOST_BY_VAE = 3
"""Previews of a request by the VAE, each of which takes as long as decoding the picture."""


@dataclass(frozen=True)
class PreviewOptions:
    """Which previews to report: of the first picture, or of the middle frame of a video.

    Attributes:
        count: so many, spread evenly over the steps.
        every: or one after each so many steps, `LEAST_STEPS_APART` at least; 0: `count` says it.
        decoder: `linear`, by a linear map from the latents to colors; `vae`, by the model's VAE, `MOST_BY_VAE` at most.
        max_edge: pixels that the longer edge has at most.
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
        role: `image`, what to change, or what a video begins with; `mask`, where to: white is drawn anew, black stays;
            `last_image`, what a video ends with; `control_image`, what to follow, such as edges; `video`, a clip.
        data: a PNG without transparency, of gray for a mask and of colors else; an animated one for a clip. Empty on
            ranks that do not need it.
    """

    role: MediaRole
    data: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        """The SHA-256 of the picture, in hexadecimal: what records and fingerprints have in place of its bytes."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class GenerationRequest:
    """One accepted request. Everything random is settled, so that running it twice gives the same picture.

    Attributes:
        request_id: unique; in logs, and what a cancellation names.
        model: name of the model in the deployment.
        prompt: what to draw.
        negative_prompt: what not to draw; None turns guidance off where the model's own pipeline does so.
        width: pixels.
        height: pixels.
        num_inference_steps: denoising steps.
        guidance_scale: strength of guidance.
        guidance_scale_2: for a model's second transformer; None: the same.
        loras: adapters by name, each with its scale.
        num_frames: of a video; 1 for pictures.
        fps: of a video, frames per second.
        seed: of the first picture or video; number i uses seed + i, unless `seeds` says otherwise.
        n: how many pictures or videos.
        output_format: of the encoded files.
        output_compression: JPEG and WebP quality, 0 to 100.
        report_steps: whether to send a `StepEvent` per step; each is a message through all layers.
        seed_drawn: the seed is not the caller's, so the same body asked again has another.
        priority: what comes first where an elastic gang must choose; of a job, that of the job.
        deadline_at: when it is worth nothing anymore, in seconds since the epoch; None: never. The gateway sees to it.
        seeds: one for each picture or video; empty: those that follow from `seed`.
        true_cfg: the guidance scale is meant for two branches; a model with one branch refuses it.
        flow_shift: of the noise schedule; None: the model's own.
        previews: which to report; None: none.
        extra_params: of the model's pipeline alone, by name; plain JSON values.
        inputs: what to start from: at most one of each role, but of `image` several; a mask only with an image.
        strength: of the change to `inputs`, 0.01 to 1; 1 keeps nothing. It is the share of the steps that are done.
            None: the family's.
        traceparent: the span that whoever has the request works for, as W3C writes it; empty: it is not traced.
        profile: whether each rank reports a `Profiled` of its steps.
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

    def input(self, role: MediaRole) -> MediaInput | None:
        """The first of a role; None: the request has none."""
        return next((each for each in self.inputs if each.role == role), None)

    def without_data(self) -> "GenerationRequest":
        """The same for ranks that do not read its pictures."""
        return replace(self, inputs=tuple(replace(each, data=b"") for each in self.inputs)) if self.inputs else self

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seed of each picture or video."""
        return self.seeds or tuple(self.seed + i for i in range(self.n))

    @property
    def steps_asked(self) -> float:
        """Steps that it asks for, before the scheduler has its say: with pictures the share of them that is done."""
        share = self.strength if self.inputs and self.strength is not None else 1.0
        return max(1.0, self.num_inference_steps * share)

    @property
    def work(self) -> int:
        """Pixels x frames x steps x pictures: what limits and fair shares count."""
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
        step: after which it was made.
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
        step_seconds: of each step, from the end of the one before to its own, on rank 0's device.
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
        request_id: what was drawn.
        took: its result, still without outputs.
    """

    request_id: str
    took: GenerationResult


@dataclass(frozen=True)
class Operator:
    """What one operator took in all steps of a profile, without what it called.

    Attributes:
        name: torch's.
        calls: how often it was called.
        host_seconds: on the CPU.
        device_seconds: on the GPU; 0 on a CPU.
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
        operators: those that took longest, the longest first: on the GPU, where there is one.
        steps: how many.
        seconds: of all steps.
        communication_seconds: of these, in collectives.
        waiting_seconds: of those, for slower ranks.
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
    """What one rank has done of a traced request since it said so last.

    Attributes:
        marks: `begin`; a stage, by its name, when it begins; `step`, when one has ended; `end`.
    """

    marks: tuple[Event, ...]


@dataclass(frozen=True)
class Part:
    """Some steps of a request of an elastic gang, on some of its ranks.

    Attributes:
        request: what is drawn.
        number: of the part, 1 for the first of the request.
        ranks: how many there are.
        encoded: its prompts, as the rank that encodes has returned them.
        progress: where it stands; empty: at its beginning.
    """

    request: GenerationRequest
    number: int
    ranks: int
    encoded: bytes = field(repr=False)
    progress: bytes = field(repr=False, default=b"")


@dataclass(frozen=True)
class Kept:
    """Where a request of an elastic gang stands, so that any of its ranks can go on from there.

    Attributes:
        steps_done: steps of its scheduler.
        progress: for `Part.progress`.
        pauses: its ranks have left it; False: they go on, and this is for the case that they are lost.
    """

    steps_done: int
    progress: bytes = field(repr=False)
    pauses: bool


@dataclass(frozen=True)
class Answer:
    """The request has left the ranks; rank 0 encodes its pictures while they compute the next.

    Attributes:
        result: comes in a moment, to whoever awaits it in the same cluster. Raises what encoding has raised, or what
            Ray raises if the rank or the gang ends before: the request can run again.
    """

    result: Awaitable[GenerationResult]


@dataclass(frozen=True)
class RankStatus:
    """What a rank answers to a ping, also while it computes.

    Attributes:
        rank: its number in the gang.
        pid: its process.
        node_id: the Ray node it runs on; empty outside Ray.
        phase: what it is doing; never `encode_media`, which it does beside everything else.
        progress: grows with every boundary it passes; if it stands still for too long, the rank hangs.
        model: the name of its model.
        loaded: the share of the model's files that it has read, from 0 to 1.
        step: denoising steps done of the request that it runs, or ran last.
        total_steps: all steps of that request; 0 until its scheduler has set them. A scheduler of second order takes
            more than `num_inference_steps`.
        kernel: what computes attention; empty until the model is loaded.
        guidance: how the latest guided request evaluated its branches: in one forward, or in two and why; empty: there
            was none yet.
        start: the seconds of each phase of the start; only in the answer to `join`.
        latest_step: of the latest step whose collectives were timed: its seconds, those in collectives, and how many of
            these it waited for slower ranks; empty: there was none.
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
