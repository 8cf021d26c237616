"""RankGroup: the processes of one gang, from their start to their loss. Never repaired, only replaced as a whole.

`workers.gang.supervisor` starts one, `workers.gang.gang` runs requests on it; `workers.gang.elastic_rank_group` is that
of an elastic gang. When a rank dies, hangs or raises inside a forward, its peers may wait in a collective that never
ends. Then these are killed by pid at once, and `on_lost` is called: of an elastic gang those that run the same request,
of any other all.
"""

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError

from deploy.model_sections import LoRA
from deploy.model_spec import ModelSpec
from workers.errors import GangLost, OutOfMemory, PeerFailed, RequestError, RequestFailed, SprayError
from workers.gang.answers import Answers
from workers.gang.losses import Losses
from workers.gang.rank_processes import assemble, kill_all
from workers.gang.rank_run import Call, RankDone, RankRun, Report
from workers.gang.watch import Watch
from workers.messages import GenerationRequest, Kept, RankStatus
from workers.metrics import Loss, StartPhase
from workers.tracing import Span

logger = logging.getLogger("ray.serve")

OnSpans = Callable[[Iterable[Span]], None]


class RankGroup:
    """The ranks of a model's layout, one per bundle of the current placement group. Made by `start`.

    Args:
        model: what the ranks have loaded.
        ranks: their actors.
        statuses: what each said when it had started.
        phases: the seconds of each phase of their start, from the making of their processes until they served.
        on_lost: called with the kind of loss, when the ranks are lost; of an elastic gang, also when some are.
    """

    def __init__(
        self,
        model: ModelSpec,
        ranks: Sequence[Any],
        statuses: Sequence[RankStatus],
        phases: Mapping[StartPhase, float],
        on_lost: Callable[[Loss], None],
    ) -> None:
        self.phases = phases
        self.startup_s = sum(phases.values())
        self._model = model
        self._ranks = ranks
        self._on_lost = on_lost
        self._losses = Losses(len(ranks), model.elastic is not None)
        self._watch = Watch(ranks, statuses, model.timeouts, self._lose)
        self._watcher: asyncio.Task[None] | None = None
        self._answers = Answers(model.timeouts.phase_s, self._lose)
        # Ray cancels whatever a canceled request has called, rank by rank, which would leave one of them alone in a
        # collective. Calls made in this context belong to the start of the ranks, not to a request.
        self._context = contextvars.copy_context()

    @classmethod
    async def start(
        cls, model: ModelSpec, processes: Sequence[Any], replica: str, on_lost: Callable[[Loss], None]
    ) -> Self:
        """Let processes meet, load the model and be its ranks, and begin to watch them.

        Args:
            model: what the ranks load.
            processes: one in each bundle, from `workers.gang.rank_processes.create`.
            replica: the gang's number among those of its model, for metrics.
            on_lost: see `RankGroup`; not called if they do not start.

        Raises:
            GangLost: a rank died, could not load the model, or was not ready in time.
        """
        began = time.monotonic()
        ranks, statuses = await assemble(processes, model, replica)
        phases = dict(statuses[0].start)
        phases["process"] = time.monotonic() - began - sum(phases.values())
        group = cls(model, ranks, statuses, phases, on_lost)  # type: ignore[arg-type]  # the ranks name phases alike
        group._watcher = asyncio.create_task(group._watch.run())
        return group

    async def run(self, request: GenerationRequest, on_spans: OnSpans = lambda spans: None) -> AsyncGenerator[Report]:
        """Run one request on all ranks. When the caller leaves early, they stop at their next boundary.

        Its answer is encoded when this has ended. Wait for `room` before.

        Args:
            request: what to draw.
            on_spans: called with the spans of each rank, if the request is traced, whatever its end.

        Raises:
            RequestError: the request does not suit the model.
            RequestFailed: it failed, or was canceled; the ranks go on, except after an `OutOfMemory` inside a step.
            GangLost: the ranks are lost.
        """
        requests = [request, *[request.without_data()] * (len(self._ranks) - 1)]
        calls = [Call(i, self._ranks[i], "generate", (each,)) for i, each in enumerate(requests)]
        async with contextlib.aclosing(self._run(calls, request, on_spans)) as reports:
            async for report in reports:
                assert not isinstance(report, Kept)
                yield report

    async def _run(
        self, calls: Sequence[Call], request: GenerationRequest, on_spans: OnSpans
    ) -> AsyncGenerator[Report | Kept]:
        """Make these calls, and yield what they report."""
        if any(call.number in self.gone for call in calls):  # lost since these ranks were chosen
            raise self._gang_lost()
        statuses = self.statuses[calls[0].number : calls[-1].number + 1]
        run = RankRun(calls, request.traceparent, statuses, self._context, self._answers)
        with self._working(run.together):
            try:
                async for report in self._collect(run):
                    yield report
            finally:
                try:
                    if run.running:
                        # Shielded, in the ranks' own context: the caller's cancellation must not reach them.
                        await asyncio.shield(asyncio.create_task(self._stop(run, request), context=self._context))
                finally:
                    on_spans(run.spans(self._losses.reason))

    async def room(self) -> None:
        """Wait until another request may begin: few pictures wait to be encoded."""
        await self._answers.room()

    @property
    def lost(self) -> str:
        """Why all ranks are lost; empty: they are not."""
        return self._losses.reason if self._losses.all else ""

    @property
    def gone(self) -> Set[int]:
        """Ranks of an elastic gang that are lost while others live. What needs none of them goes on."""
        return self._losses.gone

    @property
    def answering(self) -> bool:
        """Whether pictures of earlier requests are still encoded."""
        return len(self._answers) > 0

    @property
    def has_answered(self) -> bool:
        """Whether some request was answered by these ranks, to its files."""
        return self._answers.any_given

    async def answered(self) -> None:
        """Wait until they are not."""
        await self._answers.given()

    async def end(self) -> None:
        """End those that have outlived others, once the requests that have left them are answered."""
        if not self._losses.all:
            await self.answered()
        self._watch.stop()
        self._kill(self._losses.end())

    def cancel(self, request_id: str, ranks: range | None = None) -> None:
        """Let the ranks, or these, stop this request at their next boundary; `run` then raises `RequestCancelled`."""
        for rank in range(len(self._ranks)) if ranks is None else ranks:
            self._context.run(self._ranks[rank].cancel.remote, request_id)

    async def set_loras(self, loras: tuple[LoRA, ...]) -> None:
        """Give all ranks exactly these adapters, between requests. Those that they have are not read again.

        Raises:
            RequestError, RequestFailed: some rank could not read or run one; all ranks keep those that they had.
            GangLost: the ranks are lost.
        """
        with self._working(self._losses.everyone):
            calls = [asyncio.create_task(outcome(rank.set_loras, loras), context=self._context) for rank in self._ranks]
            await asyncio.shield(asyncio.create_task(self._join_calls(calls)))  # a caller may leave, the ranks go on

    def serve_metrics(self, host: str, port: int | None) -> None:
        """Let ranks on other nodes answer Prometheus there; on this node the gang does. See `workers.exporter`."""
        here = ray.get_runtime_context().get_node_id()
        for status, rank in zip(self.statuses, self._ranks, strict=True):
            if status.node_id != here:
                rank.serve_metrics.remote(host, port)

    def renumber(self, replica: str) -> None:
        """Let the ranks observe under another number of their gang."""
        for rank in self._ranks:
            rank.renumber.remote(replica)

    @property
    def statuses(self) -> Sequence[RankStatus]:
        """The last status of each rank, some hundred milliseconds old; of one that is gone, its last word."""
        return self._watch.statuses

    @property
    def living(self) -> list[RankStatus]:
        """The statuses of those that are not lost."""
        return [self.statuses[i] for i in sorted(self._losses.living)]

    def check_watched(self) -> None:
        """Raise if the ranks are unwatched and not known to be lost.

        Raises:
            GangLost: the watch ended by itself.
        """
        if not self._losses.all and (self._watcher is None or self._watcher.done()):
            raise GangLost(f"{self._model.name}: the watch over the ranks has ended")

    async def _collect(self, run: RankRun) -> AsyncGenerator[Report | Kept]:
        """Yield what the ranks report, until all of them are done with the request.

        It waits for every rank even when one has failed: only then is the gang free for the next request.
        """
        failures: list[SprayError] = []
        while run.running:
            report = await run.reports.get()
            if not isinstance(report, RankDone):
                yield report
                continue
            run.running -= 1
            if report.error is not None:
                failures.append(self._require_agreed(report.error, report.rank))
        _raise_reason(failures)

    async def _join_calls(self, calls: "list[asyncio.Task[tuple[Any, Exception | None]]]") -> None:
        """Wait for a call of all ranks. The first rank that is lost ends the wait: the others may never return."""
        failures: list[SprayError] = []
        for call in asyncio.as_completed(calls):
            _, error = await call
            if error is not None:
                failures.append(self._require_agreed(error, None))
        _raise_reason(failures)

    def _require_agreed(self, error: Exception, rank: int | None) -> SprayError:
        """Return an error on which all ranks agree: they stopped at the same boundary and are sound.

        Raises:
            GangLost: it is any other error. Its rank may have left the others inside a collective.
            OutOfMemory: likewise, but the request would cost any gang its ranks.
        """
        if isinstance(error, OutOfMemory) and not error.agreed:
            self._lose("out_of_memory", str(error), rank)
            raise error
        if isinstance(error, RequestError | RequestFailed):
            return error
        kind: Loss = "died" if isinstance(error, RayError) else "error"
        self._lose(kind, f"{type(error).__name__}: {error}".splitlines()[0], rank)
        raise self._gang_lost()

    async def _stop(self, run: RankRun, request: GenerationRequest) -> None:
        """Stop the ranks at their next boundary, and wait until all of them are there."""
        if self._losses.all or not run.together.isdisjoint(self.gone):
            return
        for rank in run.ranks:
            rank.cancel.remote(request.request_id)
        with contextlib.suppress(SprayError):
            async for _ in self._collect(run):
                pass

    def _lose(self, kind: Loss, reason: str, rank: int | None = None) -> None:
        """Kill this rank with those that may wait for it, and say so; or all, see `Losses`."""
        lost = self._losses.lose(rank, reason)
        if not lost:
            return
        logger.error("%s: ranks %s lost: %s", self._model.name, sorted(lost), reason)
        if self._losses.all:
            self._watch.stop()
        else:
            self._watch.leave(lost)
        self._kill(lost)
        self._on_lost(kind)

    def _kill(self, numbers: Set[int]) -> None:
        """Never twice: another process may have the pid by then."""
        kill_all([self._ranks[i] for i in sorted(numbers)], [self.statuses[i] for i in sorted(numbers)])

    def _gang_lost(self) -> GangLost:
        return GangLost(f"{self._model.name}: {self._losses.reason}")

    @contextlib.contextmanager
    def _working(self, together: Set[int]) -> Iterator[None]:
        """These ranks work, and may wait for one another."""
        with self._losses.together(together), self._watch.working():
            yield


async def outcome(method: Any, *arguments: Any) -> tuple[Any, Exception | None]:
    """Call a method of one rank: a reference to what it returns, once it has, and what it raised, or None."""
    reference = None
    try:
        reference = method.remote(*arguments)
        await reference
    except RayTaskError as error:
        return reference, error.cause
    except Exception as error:
        return reference, error
    return reference, None


def _raise_reason(failures: list[SprayError]) -> None:
    """Raise the most telling of the failures, if any: a rank with the reason before ranks that only stopped with it."""
    if failures:
        raise min(failures, key=lambda error: isinstance(error, PeerFailed))
