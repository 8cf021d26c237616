"""Gang: one model copy on N ranks. The Serve deployment whose replicas are the unit of scheduling and of failure.

A model comes in two parts: the fixed one at construction and the live one by `reconfigure`. The gang makes sure that
the weights are on its node, lets `workers.gang.supervisor` start the ranks in the replica's own placement group, and
then takes requests one at a time, or several side by side if it is elastic. Called by `service.gateway`; its load, told
by `workers.gang.gang_report`, goes to `service.autoscaling` and `service.routing`.
"""

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

from huggingface_hub.constants import HF_HUB_CACHE
from ray.serve.schema import ReplicaRank

from deploy.families.lookup import find_family
from deploy.model_spec import ModelSpec
from deploy.storage_spec import Storage
from workers.disk import watch_disk
from workers.errors import UNKNOWN_LORA, GangLost, InvalidParameter
from workers.exporter import Exporter, share_values
from workers.gang.adapter_sync import AdapterSync
from workers.gang.caller import cancel_when_gone
from workers.gang.cost import CostModel
from workers.gang.elastic import Elastic
from workers.gang.elastic_rank_group import ElasticRankGroup
from workers.gang.gang_guard import start_guard
from workers.gang.gang_report import GangReport
from workers.gang.journey import Journey
from workers.gang.placement import seconds_to_place
from workers.gang.rank_group import RankGroup
from workers.gang.ray_internals import keep_replica_on_node_ip
from workers.gang.setup import Setup
from workers.gang.supervisor import Supervisor
from workers.messages import Answer, Begun, Drawn, GenerationRequest, Preview, Profiled, StepEvent
from workers.model.compile_cache import cache_folder
from workers.model.files import fetch
from workers.observing import GangMetrics
from workers.tracing import OFF, OpenSpan, Tracing

logger = logging.getLogger("ray.serve")


class Gang:
    """All ranks of one model copy.

    Args:
        fixed: `ModelSpec.fixed`.
    """

    _setup: Setup  # from the first `reconfigure` on, as are the others
    _report: GangReport
    _supervisor: Supervisor | None = None
    _elastic: Elastic | None = None  # also if the gang is not

    def __init__(self, fixed: dict[str, Any]) -> None:
        self._tracing = Tracing()
        self._guard = start_guard()
        keep_replica_on_node_ip()
        self._fixed = fixed
        self._exporter = Exporter(share_values())
        self._adapter_change: asyncio.Task[None] | None = None  # also while it runs: a reference keeps it alive
        self._costs = CostModel()

    async def reconfigure(self, user_config: dict[str, Any], rank: ReplicaRank) -> None:
        """Called by Serve once before this replica takes requests, and whenever the live part of the model changes, or
        the number of this replica.

        Once ranks run it returns at once, because Serve sends no requests meanwhile: new adapters are loaded in a turn
        of their own, ahead of later requests.

        Args:
            user_config: `{"model": ModelSpec.live, "storage": its `models` and `compiled`,
                "metrics": DeploymentSpec.metrics_at, "tracing": its `tracing`}`.
            rank: the number of this replica. `serve.get_replica_context()` has the former one until this is over.

        Raises:
            GangLost: a rank did not start, or could not load the model, within the start-up limit.
            ValueError: the model's files cannot be had, or are damaged.
        """
        model = ModelSpec.model_validate(self._fixed | user_config["model"])
        number = str(rank.rank)
        self._exporter.serve_at(**user_config["metrics"])
        self._tracing.follow(**user_config.get("tracing", OFF))  # an older version deployed none
        if self._supervisor is None or self._supervisor.ranks is None:
            await self._start(model, Storage(**user_config["storage"]), user_config["metrics"], number)
        else:
            self._adjust(self._supervisor.ranks, model, user_config["metrics"], number)

    async def generate(
        self, request: GenerationRequest, caller: str = ""
    ) -> AsyncIterator[Begun | StepEvent | Preview | Profiled | Answer]:
        """Run one request on all ranks: `Begun`, then steps and previews, then an `Answer`, whose result follows. In an
        elastic gang a request may have to stand by before it has begun.

        So the next request can begin while the pictures of this one are encoded.

        Args:
            request: what to draw.
            caller: the name of the actor that asks. If it ends, so does the request. Empty: nobody looks.

        Raises:
            RequestError: the request does not suit the model.
            RequestFailed: it failed, or was canceled; the ranks go on.
            GangLost: the ranks are lost; the request can run again.
        """
        with self._why_it_lacks_adapters():
            parts = (
                self._generate_elastic(self._elastic, request, caller)
                if self._elastic
                else self._generate(request, caller)
            )
            async with contextlib.aclosing(parts):
                async for said in parts:
                    yield said

    async def _generate(
        self, request: GenerationRequest, caller: str
    ) -> AsyncGenerator[Begun | StepEvent | Preview | Profiled | Answer]:
        """`generate` with all ranks for one request at a time."""
        async with self._turn(request) as ranks:
            watching = asyncio.create_task(cancel_when_gone(caller, lambda: ranks.cancel(request.request_id)))
            try:
                with self._tracing.span(request.traceparent, "gang", self._described) as span:
                    yield Begun()
                    told = dataclasses.replace(request, traceparent=span.traceparent)
                    async with contextlib.aclosing(ranks.run(told, span.add)) as reports:
                        async for report in reports:
                            if isinstance(report, Drawn):
                                if not request.profile:  # which is slower than others
                                    self._costs.observe(request, self._setup.forwards(request), report.took)
                            else:
                                yield report
            finally:
                watching.cancel()

    @contextlib.contextmanager
    def _why_it_lacks_adapters(self) -> Iterator[None]:
        """Say of an adapter that the ranks lack why they do, if its file cannot be read or they change to it now."""
        try:
            yield
        except InvalidParameter as error:
            if error.code != UNKNOWN_LORA or not (why := self._setup.adapters.trouble):
                raise
            raise InvalidParameter(error.param, f"{error}; {why}", UNKNOWN_LORA) from None

    async def _generate_elastic(
        self, elastic: Elastic, request: GenerationRequest, caller: str
    ) -> AsyncGenerator[Begun | StepEvent | Preview | Profiled | Answer]:
        """`generate` beside other requests. What has lost its ranks goes on from where it was kept."""
        with self._tracing.span(request.traceparent, "gang", self._described) as span:
            told = dataclasses.replace(request, traceparent=span.traceparent)
            async with contextlib.aclosing(self._travel(elastic, told, caller, span)) as parts:
                async for said in parts:
                    yield said

    async def _travel(
        self, elastic: Elastic, request: GenerationRequest, caller: str, span: OpenSpan
    ) -> AsyncGenerator[Begun | StepEvent | Preview | Profiled | Answer]:
        journey = elastic.begin(request)
        while True:
            async with self._turn(request) as any_ranks:
                ranks = cast("ElasticRankGroup", any_ranks)
                if not journey.use(self._setup.adapters.loaded):
                    raise GangLost("adapters of the request were replaced after it had lost its ranks; it begins anew")
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
        self, elastic: Elastic, ranks: ElasticRankGroup, journey: Journey, span: OpenSpan
    ) -> AsyncGenerator[Begun | StepEvent | Preview | Profiled | Answer]:
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

    def _fall_back(self, journey: Journey, ranks: ElasticRankGroup, span: OpenSpan, error: GangLost) -> None:
        """A request has lost its ranks. Raises the error if it does not go on in this gang."""
        if journey.request.profile or not journey.fall_back(ranks):  # half a profile is none: it is begun anew
            raise error
        name, after = journey.request.request_id, journey.steps_done
        span.event("lost", {"reason": str(error), "goes_on_after_step": after})
        logger.warning("%s: %s goes on after step %d: %s", self._setup.model.name, name, after, error)

    async def check_health(self) -> None:
        """Called by Serve every second. A loss that is being dealt with is healthy: Serve would end the replica.

        Raises:
            GangLost: nobody watches the ranks anymore; Serve then replaces the whole gang.
        """
        if self._supervisor and self._supervisor.ranks:
            self._supervisor.ranks.check_watched()

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Called by Serve when this replica ends, after its last request: the ranks stay until they have answered."""
        ranks = self._supervisor.ranks if self._supervisor else None
        answered = ranks.answered() if ranks and ranks.answering else None
        return self._end(answered) if answered or self._tracing.on else None

    async def _end(self, answered: Coroutine[Any, Any, None] | None) -> None:
        if answered:
            await answered
        await self._tracing.close()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for its autoscaler; see `GangLoad`."""
        return self._report.to_autoscaler()

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve for its routers; see `GangReport.to_routers`."""
        return self._report.to_routers()

    async def _start(self, model: ModelSpec, storage: Storage, metrics_at: dict[str, Any], number: str) -> None:
        """Fetch the model and start the first ranks."""
        began = time.monotonic()
        watch_disk("models", Path(storage.models or HF_HUB_CACHE) if model.from_hub else Path(model.source))
        if model.compile:
            watch_disk("compiled", cache_folder(storage.compiled))
        folder = await asyncio.to_thread(fetch, model, storage.models)
        fetched_s = time.monotonic() - began
        commit = {"revision": folder.name} if model.from_hub else {}  # ranks on other nodes must fetch the same
        setup = Setup(
            model=model.model_copy(update=commit),
            adapters=AdapterSync(model.loras),
            family=find_family(folder),
            storage=storage,
            context=contextvars.copy_context(),
            metrics_at=metrics_at,
            metrics=GangMetrics(model.name, number),
        )
        await self._set_up(setup).start()
        placed_s = await asyncio.to_thread(seconds_to_place)
        setup.metrics.started({"place": placed_s, "fetch": fetched_s})

    def _set_up(self, setup: Setup) -> Supervisor:
        """Make the gang's parts."""
        self._setup = setup
        self._elastic = Elastic(setup.model, setup.family) if setup.model.elastic else None
        self._supervisor = Supervisor(setup, self._elastic)
        self._report = GangReport(setup, self._supervisor, self._elastic, self._costs)
        return self._supervisor

    def _adjust(self, ranks: RankGroup, model: ModelSpec, metrics_at: dict[str, Any], number: str) -> None:
        """Take over what changed while ranks run. Adapters follow in a turn of their own."""
        setup = self._setup
        ranks.serve_metrics(**metrics_at)
        if number != setup.metrics.replica:  # Serve may renumber the gangs of a model when one stops
            setup.metrics.end()
            setup.metrics = GangMetrics(model.name, number)
            ranks.renumber(number)
        setup.model = model.model_copy(update={"revision": setup.model.revision})
        setup.metrics_at = metrics_at
        setup.adapters.want(model.loras)
        if self._adapter_change is None or self._adapter_change.done():
            assert self._supervisor is not None, "it has the ranks"
            follow = setup.adapters.follow(model.name, self._supervisor.alone)
            self._adapter_change = asyncio.create_task(follow, context=setup.context)

    def _turn(self, request: GenerationRequest) -> contextlib.AbstractAsyncContextManager[RankGroup]:
        assert self._supervisor is not None, "Serve configures a replica before it sends requests"
        return self._supervisor.turn(request)

    @property
    def _described(self) -> dict[str, str]:
        """For traces."""
        model, replica = self._setup.model, self._setup.metrics.replica
        return {"spray.model": model.name, "spray.replica": replica, "spray.layout": str(model.parallel)}
