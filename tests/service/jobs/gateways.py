"""Gateways that run jobs, for tests: a store in a file, a folder of outputs, and models that do what a test says."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

from deploy.model_spec import ModelSpec
from service.api.backend import Report
from service.jobs.backlog import JobBacklog
from service.jobs.inputs import keep
from service.jobs.lost_runners import LostRunners
from service.jobs.records import Job
from service.jobs.requests import new_job
from service.jobs.runner import Runner
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.state.outputs import OutputStore
from sp_core.degrees import ParallelDegrees
from workers.messages import GenerationRequest, GenerationResult, StepEvent

REQUEST = GenerationRequest(
    "a", "film", "a cup", 64, 64, 4, seed=7, num_frames=5, output_format="mp4", loras=(("i", 0.5),)
)
RESULT = GenerationResult((b"film",), (7,), ParallelDegrees(), 0.1, (0.1,) * 4, 0.1, ("cut",))

Script = Callable[[GenerationRequest], AsyncGenerator[Report]]


def named(name: str, *aliases: str) -> ModelSpec:
    """A model that is only known by its names."""
    return ModelSpec(name=name, aliases=aliases, source="/nowhere")


class World:
    """A store in a file, a folder of outputs, and a runner whose model does what a test says."""

    def __init__(self, folder: Path, script: Script) -> None:
        self.jobs, self.outputs = Jobs(), OutputStore()
        self.jobs.follow(str(folder / "jobs"), None, 1000.0)
        self.outputs.follow(str(folder / "outputs"), 1000.0)
        self.asked: list[tuple[str, GenerationRequest]] = []
        self.script = script
        self.room = {"film": 1}
        self.models: dict[str, ModelSpec] = {"film": named("film")}
        self.gone: set[str] = set()
        self.backlog = JobBacklog(dict)
        self.runner = self.another("gateway-1")

    def another(self, name: str) -> Runner:
        """One of another gateway."""
        known = (lambda: self.room), (lambda: self.models)
        lost = LostRunners(name, lambda runner: runner not in self.gone)
        return Runner(self.jobs, self.outputs, name, self._generate, *known, self.backlog, lost)

    async def submit(self, request: GenerationRequest = REQUEST, owner: str = "ann", **given: Any) -> Job:
        new = await keep(self.jobs, self.outputs, new_job(request, owner, **given), request.inputs)
        job, _ = await self.jobs.ask(JobStore.submit, new)
        self.runner.wake()
        return job

    async def until(self, job: Job, condition: Callable[[Job], bool]) -> Job:
        async with asyncio.timeout(30):
            while not condition(found := await self.jobs.ask(JobStore.get, job.id, None)):
                await asyncio.sleep(0.01)
        return found

    async def ended(self, job: Job) -> Job:
        return await self.until(job, lambda found: found.ended)

    async def _generate(self, owner: str, request: GenerationRequest) -> AsyncGenerator[Report]:
        self.asked.append((owner, request))
        async with contextlib.aclosing(self.script(request)) as reports:
            async for report in reports:
                yield report


def live(folder: Path, script: Script, story: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(story(World(folder, script)), 60)

    asyncio.run(run())


async def draws(request: GenerationRequest) -> AsyncGenerator[Report]:
    for step in range(1, 5):
        yield StepEvent(step, 4, 0.1)
    yield RESULT
