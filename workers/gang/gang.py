"""Gang: one model copy on N ranks. The Serve deployment whose replicas are the unit of scheduling and of failure.

A model comes in two parts, the fixed one at construction and the live one by `reconfigure`. The gang sees to it that
the weights are on its node, starts its ranks in the replica's own placement group, and then takes requests one at a
time. Called by `service.gateway`; what it says of itself goes to `service.autoscaling` and `service.routing`.

When the ranks are lost, as many new processes take their places on the same devices; that takes seconds, and keeps
the placement. When it fails, or happens again and again, the replica ends, and Serve places a whole new gang.
"""

import asyncio
import contextvars
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from deploy.pipelines import PIPELINES, pipeline_name
from deploy.spec import LoRA, ModelSpec
from workers.errors import GangLost, RequestFailed
from workers.exporter import Exporter, share_values
from workers.gang.cost import CostModel
from workers.gang.rank_group import RankGroup, Report
from workers.gang.stats import GangBacklog, GangLoad
from workers.messages import GenerationRequest, GenerationResult, Phase
from workers.metrics import GangMetrics
from workers.model.files import fetch

logger = logging.getLogger("ray.serve")

LOSSES_IN_PLACE = 3
"""How often in a row, without a finished request between, lost ranks are replaced on the same devices. As often as the
gateway tries one request, so that no single request can bring a replica down."""


class Gang:
    """All ranks of one model copy.

    Args:
        fixed: `ModelSpec.fixed`.
    """

    def __init__(self, fixed: dict[str, Any]) -> None:
        self._fixed = fixed
        self._turn = asyncio.Lock()
        self._losses = 0
        self._incarnation = itertools.count(1)
        self._ranks: RankGroup | None = None
        self._replacing = False
        self._refused = ""
        self._running: GenerationRequest | None = None
        self._costs = CostModel()
        self._exporter = Exporter(share_values())

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve once before this replica takes requests, and whenever the live part of the model changes.

        When ranks run it returns at once, because Serve sends no requests meanwhile: new adapters are loaded in a turn
        of their own, ahead of the requests that come later.

        Args:
            user_config: `{"model": ModelSpec.live, "models_folder": where models from the hub are kept, or None,
                "metrics": DeploymentSpec.metrics_at}`.

        Raises:
            GangLost: a rank did not start, or could not load the model, within the start-up limit.
            ValueError: the model's files cannot be had, or are damaged.
        """
        model = ModelSpec.model_validate(self._fixed | user_config["model"])
        self._metrics_at = user_config["metrics"]
        self._exporter.serve_at(**self._metrics_at)
        number = str(serve.get_replica_context().rank.rank)
        if self._ranks is None:
            self._metrics = GangMetrics(model.name, number)
            self._models_folder = user_config["models_folder"]
            folder = await asyncio.to_thread(fetch, model, self._models_folder)
            self._kind = PIPELINES[pipeline_name(folder)]
            commit = {"revision": folder.name} if model.from_hub else {}  # ranks on other nodes must fetch the same
            self._model = model.model_copy(update=commit)
            self._context = contextvars.copy_context()  # ranks must not belong to the request that happens to lose them
            self._ranks = await self._start_ranks()
            return
        self._ranks.serve_metrics(**self._metrics_at)
        if number != self._metrics.replica:  # Serve numbers the gangs of a model anew when one stops
            self._metrics.backlog(0.0)
            self._metrics = GangMetrics(model.name, number)
            self._ranks.number(number)
        former = self._model
        self._model = model.model_copy(update={"revision": former.revision, "loras": former.loras})
        if model.loras != former.loras:
            self._swap = asyncio.create_task(self._swap_adapters(model.loras), context=self._context)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Report]:
        """Run one request on all ranks: a `StepEvent` after each step, the result at last.

        Raises:
            RequestError: the request does not suit the model.
            RequestFailed: it failed, or was cancelled; the ranks go on.
            GangLost: the ranks are lost; the request can run again.
        """
        async with self._turn:
            assert self._ranks is not None, "Serve configures a replica before it sends requests"
            self._running = request
            try:
                async for report in self._ranks.run(request):
                    if isinstance(report, GenerationResult):
                        self._losses = 0
                        self._costs.observe(request, self._forwards(request), report)
                    yield report
            finally:
                self._running = None

    async def check_health(self) -> None:
        """Called by Serve every second.

        Raises:
            GangLost: nobody watches the ranks any more; Serve replaces the whole gang then.
        """
        if self._ranks is not None:
            self._ranks.check_watched()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for its autoscaler; see `GangLoad`."""
        remaining_s = self._remaining_s()
        self._metrics.backlog(remaining_s)
        return GangLoad(
            remaining_s=remaining_s,
            request_s=self._costs.mean_request_s or 0.0,
            busy=float(self._running is not None),
            startup_s=self._startup_s,
            target_s=self._model.autoscaling.target_backlog_seconds,
        ).as_stats()

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve for its routers: what `GangBacklog` says, and under `now` what a person may want to see."""
        backlog = GangBacklog(
            backlog_s=self._remaining_s(),
            reported_at=time.time(),
            request_s=self._costs.mean_request_s or 0.0,
            shapes=frozenset(self._costs.shapes)
            | {(s.width, s.height, s.num_frames) for s in self._model.warmup_shapes},
        )
        phase, step = self._progress()
        now = {
            "replica": serve.get_replica_context().replica_id.unique_id,
            "pids": [status.pid for status in self._ranks.statuses] if self._ranks and not self._replacing else [],
            "phase": phase,
            "step": step,
            "trouble": "a gang has lost its ranks, new ones start" if self._replacing else self._refused,
            "total_steps": self._running.num_inference_steps if self._running else 0,
            "startup_s": round(self._startup_s, 3),
        }
        return backlog.as_stats() | {"now": now}

    def _remaining_s(self) -> float:
        """Seconds until the gang is free; 0 while nothing of that kind was run before."""
        if self._replacing:
            return self._startup_s
        if self._running is None:
            return 0.0
        _, step = self._progress()
        return self._costs.seconds(self._running, self._forwards(self._running), step) or 0.0

    def _progress(self) -> tuple[Phase, int]:
        """What the gang is doing, and how many steps of the running request are done."""
        if self._ranks is None or self._replacing:
            return "starting", 0
        said = self._ranks.statuses[0]
        if self._running is None:
            return said.phase, 0
        if said.phase == "idle":  # that was before this request: what a rank said is some hundred milliseconds old
            return "encode", 0
        return said.phase, said.step

    def _forwards(self, request: GenerationRequest) -> int:
        return self._kind.branches(request.guidance_scale, request.negative_prompt)

    async def _start_ranks(self) -> RankGroup:
        replica = serve.get_replica_context().replica_id.unique_id
        name = f"{self._model.name}-{replica}-{next(self._incarnation)}"
        began = time.monotonic()
        number = self._metrics.replica
        ranks = await RankGroup.start(self._model, self._models_folder, name, number, self._on_lost)
        self._startup_s = time.monotonic() - began
        self._metrics.started(self._startup_s)
        ranks.serve_metrics(**self._metrics_at)
        if number != self._metrics.replica:
            ranks.number(self._metrics.replica)
        return ranks

    async def _swap_adapters(self, loras: tuple[LoRA, ...]) -> None:
        async with self._turn:
            assert self._ranks is not None
            try:
                await self._ranks.set_loras(loras)
            except RequestFailed as error:  # all ranks keep the adapters they had
                self._refused = f"the adapters cannot be changed: {error}"
                logger.error("%s: %s", self._model.name, self._refused)
                return
            except GangLost as error:  # the ranks that follow get the adapters that were there
                logger.error("%s: lost while the adapters were changed: %s", self._model.name, error)
                return
            self._model = self._model.model_copy(update={"loras": loras})
            self._refused = ""

    def _on_lost(self) -> None:
        self._losses += 1
        self._replacing = True
        self._replacement = asyncio.create_task(self._replace_ranks(), context=self._context)
        self._metrics.lost()

    async def _replace_ranks(self) -> None:
        async with self._turn:  # requests wait meanwhile
            if self._losses <= LOSSES_IN_PLACE:
                try:
                    self._ranks = await self._start_ranks()
                    self._replacing = False
                    logger.warning("%s: all ranks are replaced", self._model.name)
                    return
                except Exception:
                    logger.exception("%s: the ranks cannot be replaced", self._model.name)
            logger.error("%s: the gang ends, so that Serve places another", self._model.name)
            os._exit(1)
