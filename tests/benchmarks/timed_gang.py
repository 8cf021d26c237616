"""A gang whose ranks compute nothing: each step takes as long as the prompt says. For `tests.benchmarks.api`.

Everything else is the real `Gang`: its turn, its load, its reports, its answer. Beside it `hop_app`, a bare deployment
of Serve that answers at once, as a measure of what Serve itself takes.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import ray
from fastapi import FastAPI, Request, Response
from ray import serve
from ray.serve import Application

from service.names import GANG
from sp_core.degrees import ParallelDegrees
from workers.gang.answers import Answers
from workers.gang.gang import Gang
from workers.gang.setup import Setup
from workers.gang.supervisor import Supervisor
from workers.messages import Drawn, GenerationRequest, GenerationResult, RankStatus, StepEvent

PICTURE_BYTES = 100_000
PICTURE = bytes(range(256)) * (PICTURE_BYTES // 256)


class TimedRanks:
    """What a gang needs of its ranks."""

    startup_s = 1.0
    answering = False
    has_answered = True

    def __init__(self, model: str) -> None:
        self._answers = Answers(60.0, lambda *_: None)
        self.statuses = self.living = [RankStatus(0, 0, "", "idle", 0, model, 1.0, 0)]

    async def room(self) -> None:
        """There always is."""

    async def run(self, request: GenerationRequest, _on_spans: Any) -> AsyncGenerator[Any]:
        """Its steps take as many milliseconds as the prompt begins with. Who leaves is noticed when a step ends."""
        step_s = float(request.prompt.split()[0]) / 1000
        steps = []
        for number in range(request.num_inference_steps):
            began = time.perf_counter()
            step = asyncio.ensure_future(asyncio.sleep(step_s))
            try:
                await asyncio.shield(step)
            except asyncio.CancelledError:
                await step  # the boundary
                raise
            steps.append(time.perf_counter() - began)
            if request.report_steps:
                yield StepEvent(number + 1, request.num_inference_steps, steps[-1])
        seeds = request.all_seeds
        took = GenerationResult((PICTURE,) * len(seeds), seeds, ParallelDegrees(), 0.0, tuple(steps), 0.0)
        yield Drawn(request.request_id, took)
        yield self._answers.open(ray.put(took))

    def cancel(self, request_id: str) -> None:
        """A gang calls this when its gateway has died, which this benchmark does not do."""

    def check_watched(self) -> None:
        """Nothing here can hang."""

    def serve_metrics(self, **where: Any) -> None:
        """There are none."""

    def renumber(self, replica: str) -> None:
        """There are no metrics."""


class TimedGang(Gang):
    """A gang of such ranks."""

    def _set_up(self, setup: Setup) -> Supervisor:
        supervisor = super()._set_up(setup)

        async def start_ranks() -> Any:
            return TimedRanks(setup.model.name)

        supervisor._start_ranks = start_ranks  # type: ignore[method-assign]
        return supervisor


def timed_gang_app(args: dict[str, Any]) -> Application:
    """As `service.app.gang_app`."""
    return serve.deployment(name=GANG)(TimedGang).bind(args)


hop = FastAPI()


@hop.post("/")
async def answer(http: Request) -> Response:
    """As many bytes as a picture has in the API's JSON."""
    await http.json()
    return Response(b'"' + b"a" * (4 * len(PICTURE) // 3) + b'"', media_type="application/json")


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
@serve.ingress(hop)
class Hop:
    """Answers at once."""


def hop_app(args: dict[str, Any]) -> Application:
    """A bare deployment. Called by Serve."""
    return Hop.bind()
