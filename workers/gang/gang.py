"""Gang: one model copy on N ranks. The Serve deployment whose replicas are the unit of scheduling and of failure.

A model comes in two parts: the fixed one at construction and the live one by `reconfigure`. The gang makes sure that
the weights are on its node, starts its ranks in the replica's own placement group, and then takes requests one at a
time, or several side by side if it is elastic. Called by `service.gateway`; its load goes to `service.autoscaling` and
`service.routing`.

When the ranks are lost, new processes or spare ones take their places on the same devices. That takes seconds and
keeps the placement. If it fails, or happens again and again, the replica exits, and Serve places a whole new gang.
When an elastic gang loses some of its ranks, all are replaced, but first what it has goes on on the others.
"""

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import itertools
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from ray import serve

from deploy.families.lookup import find_family
from deploy.spec import ModelSpec, Storage
from workers.disk import watch_disk
from workers.errors import GangLost
from workers.exporter import Exporter, share_values
from workers.gang.adapter_sync import AdapterSync
from workers.gang.caller import cancel_when_gone
from workers.gang.cost import CostModel
from workers.gang.elastic import NO_REQUESTS, Elastic, slots
from workers.gang.gang_guard import start_guard
from workers.gang.journey import Journey
from workers.gang.placement import seconds_to_place
from workers.gang.rank_group import RankGroup
from workers.gang.rank_processes import create
from workers.gang.ray_internals import keep_replica_on_node_ip
from workers.gang.setup import Setup
from workers.gang.spare_ranks import SpareRanks
from workers.gang.stats import GangBacklog, GangLoad, Movement, Progress, progress, step_split
from workers.gang.turn import Turn
from workers.messages import Answer, Begun, Drawn, GenerationRequest, Preview, Profiled, RankStatus, StepEvent
from workers.metrics import Loss
from workers.model.compile_cache import cache_folder
from workers.model.files import fetch
from workers.observing import GangMetrics
from workers.tracing import OFF, OpenSpan, Tracing

logger = logging.getLogger("ray.serve")

LOSSES_IN_PLACE = 4
"""How often in a row, with no request finished in between, lost ranks are replaced on the same devices. As often as
the gateway tries one request, times the tries of an elastic gang, so that no single request can end a replica."""


LOST = "a gang has lost its ranks, new ones start"
SOME_LOST = "a gang has lost some of its ranks; it finishes what it has on the others, then new ones start"

ADAPTERS_AGAIN_S = 30.0
"""Adapters that the ranks refused are tried again after this time: their file may have been mended."""


class Gang:
    """All ranks of one model copy.

    Args:
        fixed: `ModelSpec.fixed`.
    """

    _ranks: RankGroup | None = None  # until they have started; afterwards the current ones, even when lost

    def __init__(self, fixed: dict[str, Any]) -> None:
        self._guard = start_guard()
        keep_replica_on_node_ip()
        self._fixed = fixed
        self._exporter = Exporter(share_values())
        self._turn = Turn()
        self._setup: Setup | None = None  # until the first `reconfigure`
        self._incarnation = itertools.count(1)
        self._losses = 0
        self._replacement: asyncio.Task[None] | None = None  # also while it runs, as a reference that keeps it alive
        self._adapter_change: asyncio.Task[None] | None = None  # likewise
        self._adapters_changed = asyncio.Event()  # the deployment file has, not yet the ranks
        self._whole = asyncio.Event()  # unset while lost ranks are replaced
        self._whole.set()
        self._running: GenerationRequest | None = None  # the latest, of an elastic gang
        self._elastic: Elastic | None = None  # also if the gang is not
        self._spares = SpareRanks()
        self._costs = CostModel()
        self._movement = Movement()
        self._tracing = Tracing()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve once before this replica takes requests, and whenever the live part of the model changes.

        Once ranks run it returns at once, because Serve sends no requests meanwhile: new adapters are loaded in a turn
        of their own, ahead of later requests.

        Args:
            user_config: `{"model": ModelSpec.live, "storage": its `models` and `compiled`,
                "metrics": DeploymentSpec.metrics_at, "tracing": its `tracing`}`.

        Raises:
            GangLost: a rank did not start, or could not load the model, within the start-up limit.
            ValueError: the model's files cannot be had, or are damaged.
        """
        model = ModelSpec.model_validate(self._fixed | user_config["model"])
        number = str(serve.get_replica_context().rank.rank)
        self._exporter.serve_at(**user_config["metrics"])
        self._tracing.follow(**user_config.get("tracing", OFF))  # an older version deployed none
        if self._ranks is None:
            await self._start(model, Storage(**user_config["storage"]), user_config["metrics"], number)
        else:
            self._adjust(model, user_config["metrics"], number)

    async def generate(
        self, request: GenerationRequest, caller: str = ""
    ) -> AsyncIterator[Begun | StepEvent | Preview | Profiled | Answer]:
        """Run one request on all ranks: `Begun`, then steps and previews, then an `Answer`, whose result follows.

        So the next request can begin while the pictures of this one are encoded.

        Args:
            request: what to draw.
            caller: the name of the actor that asks. If it ends, so does the request. Empty: nobody looks.

        Raises:
            RequestError: the request does not suit the model.
            RequestFailed: it failed, or was canceled; the ranks go on.
            GangLost: the ranks are lost; the request can run again.
        """
        if self._elastic:
            with self._tracing.span(request.traceparent, "gang", self._described) as span:
                told = dataclasses.replace(request, traceparent=span.traceparent)
                parts = self._generate_elastic(self._elastic, told, caller, span)
                async with contextlib.aclosing(parts):
                    async for said in parts:
                        yield said
            return
        async with self._turn_on_ranks(request) as ranks:
            watching = asyncio.create_task(cancel_when_gone(caller, lambda: ranks.cancel(request.request_id)))
            try:
                with self._tracing.span(request.traceparent, "gang", self._described) as span:
                    yield Begun()
                    told = dataclasses.replace(request, traceparent=span.traceparent)
                    async with contextlib.aclosing(ranks.run(told, span.add)) as reports:
                        async for report in reports:
                            if isinstance(report, Drawn):
                                if not request.profile:  # which is slower than others
                                    self._costs.observe(request, self._forwards(request), report.took)
                            else:
                                yield report
            finally:
                watching.cancel()

    async def _generate_elastic(
        self, elastic: Elastic, request: GenerationRequest, caller: str, span: OpenSpan
    ) -> AsyncGenerator[Begun | StepEvent | Preview | Profiled | Answer]:
        """`generate` beside other requests. What has lost its ranks goes on from where it was kept."""
        journey = elastic.begin(request)
        yield Begun()
        while True:
            async with self._turn_on_ranks(request) as ranks:
                cancel = functools.partial(elastic.cancel, ranks, request.request_id)
                watching = asyncio.create_task(cancel_when_gone(caller, cancel))
                try:
                    goes_on_here = True
                    while goes_on_here:
                        try:
                            async with contextlib.aclosing(self._run_elastic(elastic, ranks, journey, span)) as reports:
                                async for report in reports:
                                    yield report
                            return
                        except GangLost as error:
                            self._fall_back(journey, ranks, span, error)
                            goes_on_here = elastic.can_go_on(ranks, journey)
                finally:
                    watching.cancel()

    async def _run_elastic(
        self, elastic: Elastic, ranks: RankGroup, journey: Journey, span: OpenSpan
    ) -> AsyncGenerator[StepEvent | Preview | Profiled | Answer]:
        """What is left of a request, on these ranks."""
        request = journey.request
        async with contextlib.aclosing(elastic.run(ranks, journey, span.add)) as reports:
            async for report in reports:
                if isinstance(report, Drawn):
                    if not request.profile:
                        learned = elastic.learned(journey, report.took)
                        self._costs.observe(request, journey.forwards, report.took, *learned)
                elif not isinstance(report, StepEvent) or request.report_steps:
                    yield report

    def _fall_back(self, journey: Journey, ranks: RankGroup, span: OpenSpan, error: GangLost) -> None:
        """A request has lost its ranks. Raises the error if it does not go on in this gang."""
        if journey.request.profile or not journey.fall_back(ranks):  # half a profile is none: it is begun anew
            raise error
        name, after = journey.request.request_id, journey.steps_done
        span.event("lost", {"reason": str(error), "goes_on_after_step": after})
        logger.warning("%s: %s goes on after step %d: %s", self._started.model.name, name, after, error)

    async def check_health(self) -> None:
        """Called by Serve every second. A loss that is being dealt with is healthy: Serve would end the replica.

        Raises:
            GangLost: nobody watches the ranks anymore; Serve then replaces the whole gang.
        """
        if self._ranks is not None:
            self._ranks.check_watched()

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Called by Serve when this replica ends, after its last request: the ranks stay until they have answered."""
        return self._ranks.answered() if self._ranks and self._ranks.answering else None

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for its autoscaler; see `GangLoad`."""
        setup, remaining_s = self._started, self._remaining_s()
        capacity = len(self._living) / setup.model.parallel.world_size
        setup.metrics.now(remaining_s, capacity, self._moved_at())
        if self._elastic:
            setup.metrics.elastic(*self._elastic.take_counts())
        return GangLoad(
            remaining_s=remaining_s,
            request_s=self._costs.mean_cost_s or 0.0,
            busy=self._elastic.busy if self._elastic else float(self._running is not None),
            startup_s=self._startup_s(),
            target_s=setup.model.autoscaling.target_backlog_seconds,
        ).as_stats()

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve for its routers: a `GangBacklog`, `Costs`, and under `now` what people see of the gang."""
        backlog = GangBacklog(
            backlog_s=self._remaining_s(),
            reported_at=time.time(),
            request_s=self._costs.mean_cost_s or 0.0,
            shapes=frozenset(self._costs.shapes)
            | {(s.width, s.height, s.num_frames) for s in self._started.model.warmup_shapes},
            replacing=self._replacing,
            busy=self._is_running,
            slots=slots(self._started.model),
            takes_s=self._costs.mean_request_s or 0.0,
        )
        ranks = self._living
        now = {
            "replica": serve.get_replica_context().replica_id.unique_id,
            "pids": [status.pid for status in ranks],
            "kernel": ranks[0].kernel if ranks else "",
            "guidance": ranks[0].guidance if ranks else "",
            "request_id": self._running.request_id if self._running else "",
            "spare_ranks": self._spares.ready,
            **(self._elastic.now if self._elastic else NO_REQUESTS),
            **self._progress()._asdict(),
            "split": step_split(self._ranks.statuses) if self._ranks and not self._replacing else None,
            "trouble": self._trouble,
            "startup_s": round(self._startup_s(), 3),
        }
        costs = self._costs.costs(self._started.family.pipeline)
        return backlog.as_stats() | {"costs": costs.as_stats(), "now": now}

    @property
    def _started(self) -> Setup:
        assert self._setup is not None, "Serve configures a replica before it uses it"
        return self._setup

    async def _start(self, model: ModelSpec, storage: Storage, metrics_at: dict[str, Any], number: str) -> None:
        """Fetch the model and start the first ranks."""
        began = time.monotonic()
        watch_disk("models", Path(storage.models or HF_HUB_CACHE) if model.from_hub else Path(model.source))
        if model.compile:
            watch_disk("compiled", cache_folder(storage.compiled))
        folder = await asyncio.to_thread(fetch, model, storage.models)
        fetched_s = time.monotonic() - began
        family = find_family(folder)
        commit = {"revision": folder.name} if model.from_hub else {}  # ranks on other nodes must fetch the same
        self._setup = Setup(
            model=model.model_copy(update=commit),
            adapters=AdapterSync(model.loras),
            family=family,
            storage=storage,
            context=contextvars.copy_context(),
            metrics_at=metrics_at,
            metrics=GangMetrics(model.name, number),
        )
        self._elastic = Elastic(model, family) if model.elastic else None
        self._ranks = await self._start_ranks()
        placed_s = await asyncio.to_thread(seconds_to_place)
        self._started.metrics.started({"place": placed_s, "fetch": fetched_s})

    def _adjust(self, model: ModelSpec, metrics_at: dict[str, Any], number: str) -> None:
        """Take over what changed while ranks run. Adapters follow in a turn of their own."""
        setup = self._started
        assert self._ranks is not None
        self._ranks.serve_metrics(**metrics_at)
        metrics = setup.metrics
        if number != metrics.replica:  # Serve may renumber the gangs of a model when one stops
            metrics.end()
            metrics = GangMetrics(model.name, number)
            self._ranks.renumber(number)
        kept = {"revision": setup.model.revision}
        self._setup = dataclasses.replace(
            setup, model=model.model_copy(update=kept), metrics=metrics, metrics_at=metrics_at
        )
        setup.adapters.want(model.loras)
        self._adapters_changed.set()
        if self._adapter_change is None or self._adapter_change.done():
            self._adapter_change = asyncio.create_task(self._change_adapters(), context=setup.context)

    @contextlib.asynccontextmanager
    async def _turn_on_ranks(self, request: GenerationRequest) -> AsyncIterator[RankGroup]:
        """A turn on sound ranks. Lost ones fail no request that had not begun: it waits until they are replaced."""
        while True:
            await self._whole.wait()
            async with self._turn.shared() if self._elastic else self._turn.alone():
                if self._replacing:
                    continue
                ranks, self._running = self._ranks, request
                assert ranks is not None, "Serve configures a replica before it sends requests"
                try:
                    await ranks.room()
                    if not self._replacing:
                        yield ranks
                        return
                finally:
                    if self._running is request:
                        self._running = None

    @property
    def _is_running(self) -> bool:
        return self._elastic.has_work if self._elastic else self._running is not None

    @property
    def _described(self) -> dict[str, str]:
        """For traces."""
        model, replica = self._started.model, self._started.metrics.replica
        return {"spray.model": model.name, "spray.replica": replica, "spray.layout": str(model.parallel)}

    @property
    def _replacing(self) -> bool:
        return not self._whole.is_set()

    @property
    def _living(self) -> list[RankStatus]:
        """What ranks have said last that are not lost."""
        return self._ranks.living if self._ranks else []

    @property
    def _trouble(self) -> str:
        """For people."""
        if self._replacing:
            return SOME_LOST if self._living else LOST
        return self._started.adapters.trouble

    def _startup_s(self) -> float:
        """Seconds that the latest ranks took to start; 0 before there are any."""
        return self._ranks.startup_s if self._ranks else 0.0

    def _moved_at(self) -> float:
        return self._movement.at(
            self._ranks.statuses if self._ranks else (), idle=not self._is_running and not self._replacing
        )

    def _remaining_s(self) -> float:
        """Seconds until the gang is free; 0 while no request was ever finished."""
        replacing_s = self._startup_s() if self._replacing else 0.0
        if self._elastic and self._living:
            return self._elastic.remaining_s + replacing_s
        if self._replacing:
            return replacing_s
        if self._running is None:
            return 0.0
        step = self._progress().step
        return self._costs.seconds(self._running, self._forwards(self._running), step) or 0.0

    def _progress(self) -> Progress:
        living = self._living
        answering = self._ranks is not None and self._ranks.answering
        return progress(living[0] if living else None, self._running, answering)

    def _forwards(self, request: GenerationRequest) -> int:
        return self._started.family.branches(request.guidance_scale, request.negative_prompt)

    async def _start_ranks(self) -> RankGroup:
        setup = self._started
        replica = serve.get_replica_context().replica_id.unique_id
        name = f"{setup.model.name}-{replica}-{next(self._incarnation)}"
        number = setup.metrics.replica
        tested = self._ranks is not None  # of replacements only the groups are tried
        model = setup.model.model_copy(
            update={"loras": setup.adapters.start_over(), "self_test": setup.model.self_test and not tested}
        )
        processes = await self._spares.take() or create(model, setup.storage, name)
        ranks = await RankGroup.start(model, processes, number, self._on_lost)
        if model.spare_ranks:
            self._spares.refill(model, setup.storage, name)
        current = self._started  # a `reconfigure` may have come while they started
        current.metrics.started(ranks.phases)
        ranks.serve_metrics(**current.metrics_at)
        if number != current.metrics.replica:
            ranks.renumber(current.metrics.replica)
        return ranks

    async def _change_adapters(self) -> None:
        """Give the ranks the adapters of the file, in a turn of its own, until they have them."""
        adapters = self._started.adapters
        while adapters.differs:
            self._adapters_changed.clear()
            async with self._turn.alone():
                if not self._replacing:  # else whoever replaces the ranks does it
                    await self._apply_adapters()
            if adapters.differs:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ADAPTERS_AGAIN_S):
                        await self._adapters_changed.wait()

    async def _apply_adapters(self) -> None:
        """Call it in a turn."""
        assert self._ranks is not None
        name, adapters = self._started.model.name, self._started.adapters
        before = adapters.trouble
        try:
            await adapters.apply(self._ranks)
        except GangLost as error:
            logger.error("%s: lost while the adapters were changed: %s", name, error)
            return
        if adapters.trouble not in ("", before):  # they are tried again and again
            logger.error("%s: %s", name, adapters.trouble)

    def _on_lost(self, kind: Loss) -> None:
        """Replace the ranks in the next turn."""
        self._started.metrics.lost(kind)
        if self._replacing:  # these had outlived others
            return
        answered = self._ranks is not None and self._ranks.has_answered
        self._losses = 1 if answered else self._losses + 1
        self._whole.clear()
        self._replacement = asyncio.create_task(self._replace_ranks(), context=self._started.context)

    async def _replace_ranks(self) -> None:
        name = self._started.model.name
        assert self._ranks is not None, "they were lost"
        leaving = self._go_on(self._ranks)
        async with self._turn.alone():  # requests that come from now on wait for the new ranks
            leaving.cancel()
            await self._ranks.end()
            if self._losses <= LOSSES_IN_PLACE:
                try:
                    self._ranks = await self._start_ranks()
                    self._whole.set()
                except Exception:
                    logger.exception("%s: the ranks cannot be replaced", name)
                else:
                    logger.warning("%s: all ranks are replaced", name)
                    await self._apply_adapters()
                    return
            logger.error("%s: the replica exits, so that Serve places a new gang", name)
            os._exit(1)  # at once: an orderly end would wait for requests that cannot finish

    def _go_on(self, ranks: RankGroup) -> asyncio.TimerHandle:
        """Requests go on on the ranks that live, if any, while processes start that will take the places of all.

        They leave them at the latest when they have had as long as the start of ranks takes: so nobody waits for more
        than twice of that, and who stands still for it would have had more than that left.
        """
        if self._elastic and self._elastic.has_work and self._living:
            setup = self._started
            name = f"{setup.model.name}-{serve.get_replica_context().replica_id.unique_id}-{next(self._incarnation)}"
            self._spares.hurry(setup.model, setup.storage, name)
        leave = self._elastic.leave if self._elastic else lambda _: None
        return asyncio.get_running_loop().call_later(self._startup_s(), leave, ranks)
