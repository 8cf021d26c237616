"""A backend without Ray for tests of the API: it answers at once, or does what the prompt names."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from deploy.model_sections import Defaults, Limits, LoRA
from deploy.model_spec import ModelSpec
from service.api.backend import Found, Report, Restarted, Waiting
from service.jobs.backlog import JobBacklog
from service.jobs.lost_runners import LostRunners
from service.jobs.records import Priority
from service.jobs.runner import Runner
from service.jobs.store_actor import Jobs
from service.jobs.webhooks import Webhooks
from service.state.idempotency import IdempotencyKeys
from service.state.live_requests import LiveRequests
from service.state.model_states import ModelState
from service.state.outputs import OutputStore
from sp_core.degrees import ParallelDegrees
from workers.errors import DeadlineExceeded, GangLost, PeerFailed, QueueFull, RequestFailed, ShuttingDown, Unauthorized
from workers.messages import GenerationRequest, GenerationResult, Preview, StepEvent

SMALL = Defaults(width=64, height=64, num_inference_steps=4, num_frames=5)
INK = LoRA(name="ink", source="/nowhere/ink.safetensors")


def a_model(name: str, **changes: Any) -> ModelSpec:
    """A model that is never loaded."""
    return ModelSpec(name=name, source="/nowhere", device="cpu", loras=(INK,), **changes)


class FakeBackend:
    """Two models for any task; `paint` makes only pictures and `film` only videos, both with aliases."""

    name = "gateway 1"
    instance_id = "test"

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.max_body_bytes = 1 << 20
        self.draining = False
        self.local_only = False
        self.cors_origins: tuple[str, ...] = ()
        self.media_hosts: tuple[str, ...] = ()
        self.public_url: str | None = None
        self.in_flight = 0
        self.outputs = OutputStore()
        self.idempotency = IdempotencyKeys("")
        self.live = LiveRequests("local")
        self.jobs = Jobs()
        self.webhooks = Webhooks(self.jobs)
        backlog = JobBacklog(dict)
        self.runner = Runner(
            self.jobs,
            self.outputs,
            "test",
            lambda owner, request: self.generate(request),
            self.room,
            self.models,
            backlog,
            LostRunners("test"),
        )
        self.key: str | None = None
        self.closed = False
        self.released = asyncio.Event()
        video_limits = Limits(max_num_frames=9, max_work=64 * 64 * 9 * 10)
        self._models = [
            a_model("one"),
            a_model("two"),
            a_model(
                "paint",
                tasks=("text-to-image",),
                aliases=("brush", "pencil"),
                limits=Limits(max_work=1024 * 1024 * 50 * 2),
            ),
            a_model("film", tasks=("text-to-video",), aliases=("movie",), limits=video_limits, defaults=SMALL),
        ]
        self.found = {model.name: ModelState("running", "", {"RUNNING": 1}) for model in self._models}
        self.raises = {
            "full": QueueFull("too many requests wait"),
            "lost": GangLost("gone"),
            "draining": ShuttingDown("about to stop"),
            "failed": RequestFailed("rank 1: MemoryError"),
            "peer": PeerFailed("rank 0 stopped"),
            "bug": ZeroDivisionError("secret detail"),
        }

    def admit(self, authorization: str | None, admin: bool = False) -> None:
        """Reject callers without the key, if a test has set one."""
        if self.key is not None and authorization != f"Bearer {self.key}":
            raise Unauthorized("a valid API key is required")

    def caller(self) -> str:
        """The key, if a test has set one."""
        return self.key or ""

    def sees(self) -> str | None:
        """The key, if a test has set one."""
        return self.key or None

    @contextlib.contextmanager
    def charge(self, request: GenerationRequest) -> Iterator[None]:
        """Nobody pays."""
        yield

    async def check_job(self, request: GenerationRequest, priority: Priority, deadline_s: float | None) -> None:
        """Whatever asks for `late` comes too late with a deadline."""
        if request.prompt == "late" and deadline_s is not None:
            raise DeadlineExceeded("the request would be answered in about 9.0 s")

    def room(self) -> dict[str, int]:
        """One job of each model."""
        return dict.fromkeys(self.models(), 1)

    def models(self) -> dict[str, ModelSpec]:
        """By name."""
        return {model.name: model for model in self._models}

    def states(self) -> dict[str, ModelState]:
        """The states that a test has set."""
        return self.found

    def cluster(self) -> dict[str, Any]:
        """Marked, so that a test recognizes it."""
        return {"object": "cluster", "mark": "of the backend"}

    async def end(self) -> None:
        """Stop its runner."""
        await self.runner.stop()

    async def find_requests(self) -> Found:
        """Those of this backend."""
        return Found(await self.live.told(None))

    async def cancel(self, request_id: str) -> bool:
        """One of this backend."""
        return self.live.cancel(request_id, None)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        """See `_generate`."""
        return self.live.watched(request, self.caller(), self._generate(request))

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        """Raise what the prompt names; `asleep` yields its state three times first, `never` forever; `slow` waits.

        `later` fails after its first step, `long` is answered with a warning, `again` loses its ranks once.
        """
        self.requests.append(request)
        if request.prompt in self.raises:
            raise self.raises[request.prompt]
        try:
            for _ in itertools.count() if request.prompt == "never" else range(3 * (request.prompt == "asleep")):
                yield Waiting(self.found[request.model], 2, 7.4)
                await asyncio.sleep(0.01)
            if request.prompt == "slow":
                await self.released.wait()
            yield StepEvent(1, 1, 0.5)
            for index in range(request.previews.count or 1 if request.previews else 0):
                yield Preview(index, 1, f"preview {index}".encode())
            if request.prompt == "again":
                yield Restarted(2, "the ranks were lost")
                yield StepEvent(1, 1, 0.5)
            if request.prompt == "later":
                raise self.raises["lost"]
            while request.prompt == "endless":
                await asyncio.sleep(0.01)
                yield StepEvent(1, 1, 0.5)
            seeds = request.all_seeds
            warnings = ("prompt: text_encoder reads 512 of 719 tokens",) if request.prompt == "long" else ()
            pictures = tuple(f"picture {seed}".encode() for seed in seeds)
            yield GenerationResult(pictures, seeds, ParallelDegrees(), 0.1, (0.5,), 0.2, warnings)
        finally:
            self.closed = True
