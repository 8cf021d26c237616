"""Elastic: the requests of one elastic gang, side by side, each on the ranks that the dealer gives it.

`workers.gang.gang` enters a request and gets its reports. In between, whenever a request comes, ends or passes a
boundary, the dealer is asked. Who is to have other ranks is told to pause, and goes on after its next step, on these.

A request keeps its progress here, outside its ranks: what has lost them goes on from there. While some ranks are lost,
the others are dealt, until the gang ends them, too.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Set
from dataclasses import replace
from typing import Any, get_args

from deploy.families.family import PipelineFamily
from deploy.model_spec import ModelSpec
from sp_core.degrees import units
from workers.errors import GangLost, RequestCancelled
from workers.gang.dealer import Block, Work, deal
from workers.gang.elastic_rank_group import ElasticRankGroup
from workers.gang.forecast import forecast
from workers.gang.journey import Journey
from workers.gang.rank_group import OnSpans
from workers.gang.rank_run import Report
from workers.gang.step_costs import StepCosts
from workers.messages import Begun, Drawn, GenerationRequest, GenerationResult, Kept, Part, Priority, StepEvent
from workers.tracing import Place, spanning

NO_REQUESTS: dict[str, Any] = {"requests": [], "changes": {}, "change_s": 0.0}
"""`Elastic.now`, of a gang that is not elastic."""

CHANGE_S = 0.05
"""What other ranks cost a request until it was measured: its prompts and progress are read anew."""

WEIGHT = 0.3
"""Of the latest change in the average."""

WAITING = 2
"""Requests that an elastic gang takes for each unit of ranks: those beyond the ranks wait in it, where the dealer knows
them, so that what is urgent overtakes what runs."""


def slots(model: ModelSpec) -> int:
    """Requests that a gang takes at once."""
    return 1 if model.elastic is None else WAITING * units(model.parallel)


class Elastic:
    """All requests of one gang.

    Args:
        model: as it is deployed, `elastic` included.
        family: what is known of its pipeline.

    Attributes:
        costs: of steps at each degree.
        changes: times that a request took other ranks (`move`), or stood still because others needed them (`pause`).
        change_s: what that costs, in seconds.
    """

    def __init__(self, model: ModelSpec, family: PipelineFamily) -> None:
        assert model.elastic is not None
        self._unit = model.parallel.tensor_parallel_size
        self._units = units(model.parallel)
        most = self._units.bit_length()
        self._degrees = [2**i for i in range(most) if 2**i >= model.elastic.min_degree]
        self._family = family
        self.costs = StepCosts()
        self.change_s = CHANGE_S
        self.changes = {"move": 0, "pause": 0}
        self._told = dict(self.changes)
        self._idle_s, self._counted_at = 0.0, time.monotonic()
        self._journeys: dict[str, Journey] = {}
        self._ranks: ElasticRankGroup | None = None  # the latest, also when lost
        self._left: ElasticRankGroup | None = None  # those on which nothing goes on

    def follow(self, ranks: ElasticRankGroup) -> None:
        """These ranks have started, and have no request yet."""
        self._count_idle()
        self._ranks = ranks

    def begin(self, request: GenerationRequest) -> Journey:
        """A request comes. Its ranks are given by `run`."""
        now = time.monotonic()
        forwards = self._family.branches(request.guidance_scale, request.negative_prompt)
        return Journey(request, forwards, now, request.num_inference_steps, now)

    async def run(
        self, ranks: ElasticRankGroup, journey: Journey, on_spans: OnSpans = lambda spans: None
    ) -> AsyncGenerator[Begun | Report]:
        """Run a request, or what is left of it, and yield all steps. `on_spans` as in `RankGroup.run`.

        `Begun` comes once, when it first has ranks to itself, or if its prompts have cost some: until then it stands
        by, and is not the cause of what happens to the gang.

        Raises:
            As `RankGroup.run`. `RequestCancelled` also if the caller has asked for the same again.
        """
        name = journey.request.request_id
        self._ranks = ranks
        await self._end_former(ranks, journey)
        self._journeys[name] = journey
        journey.gone.clear()
        try:
            self._require(ranks, journey)
            if journey.encoded is None:
                journey.computes = True
                try:
                    with spanning(Place.parse(journey.request.traceparent), "encode", {"spray.rank": 0}, on_spans):
                        journey.encoded = await ranks.encode(journey.request)
                except GangLost:
                    if journey.begins():
                        yield Begun()
                    raise
                journey.computes = False
            finished = False
            while not finished:
                if journey.cancelled:
                    raise _cancelled(name)
                self._require(ranks, journey)
                self._count_idle()
                journey.turn = asyncio.get_running_loop().create_future()
                self._deal()
                self.changes["pause"] += journey.part > 0 and not journey.turn.done()
                block = await journey.turn
                self._require(ranks, journey)
                if journey.begins():
                    yield Begun()
                async with contextlib.aclosing(self._advance(ranks, journey, block, on_spans)) as reports:
                    async for report in reports:
                        finished = finished or isinstance(report, Drawn)
                        yield report
        finally:
            self._count_idle()
            del self._journeys[name]
            journey.gone.set()
            self._deal()

    async def _end_former(self, ranks: ElasticRankGroup, journey: Journey) -> None:
        """A caller whose connection broke asks again while the request still runs. The latest is the one that counts,
        and has to wait: ranks know both by one name."""
        name = journey.request.request_id
        while former := self._journeys.get(name):
            if former.arrived > journey.arrived:  # it came while this one had lost its ranks
                raise _cancelled(name)
            former.cancelled = True
            if former.turn and not former.turn.done():
                former.turn.set_exception(_cancelled(name))
            elif former.at and not former.leaving:
                self._pause(ranks, former)  # a cancellation that comes late would hit this one
            await former.gone.wait()

    def can_go_on(self, ranks: ElasticRankGroup, journey: Journey) -> bool:
        """Whether ranks that live are enough for a request, and are not to be left."""
        if ranks.lost or ranks is self._left or (journey.encoded is None and 0 in ranks.gone):
            return False
        return bool(self._living_degrees)

    def _require(self, ranks: ElasticRankGroup, journey: Journey) -> None:
        if not self.can_go_on(ranks, journey):
            raise GangLost(ranks.lost or "other ranks of the gang are lost, and all are replaced")

    def leave(self, ranks: ElasticRankGroup) -> None:
        """Let all requests leave these ranks at their next boundary: others come. A profile is of the same ranks, and
        goes on to its end."""
        self._left = ranks
        for journey in self._journeys.values():
            if journey.turn:
                self._turn_away(journey)
            elif journey.at and not journey.leaving and not journey.request.profile:
                self._pause(ranks, journey)

    def _pause(self, ranks: ElasticRankGroup, journey: Journey) -> None:
        """Let a request that runs leave its ranks after its step."""
        assert journey.at is not None, "it runs"
        journey.leaving = True
        ranks.pause(journey.request.request_id, journey.part, self._ranks_of(journey.at))

    def _turn_away(self, journey: Journey) -> None:
        if journey.turn and not journey.turn.done():
            journey.turn.set_exception(GangLost("the gang has too few ranks until its lost ones are replaced"))

    def cancel(self, ranks: ElasticRankGroup, request_id: str) -> None:
        """Stop a request at its next boundary, or at once while it stands still."""
        journey = self._journeys.get(request_id)
        if journey is None:
            return
        journey.cancelled = True
        if journey.turn and not journey.turn.done():
            journey.turn.set_exception(_cancelled(request_id))
        elif journey.at:
            ranks.cancel(request_id, self._ranks_of(journey.at))

    def take_counts(self) -> tuple[float, dict[str, int]]:
        """Seconds of living ranks without a request, summed over ranks, and changes by kind; both since the last
        call."""
        self._count_idle()
        idle_s, self._idle_s = self._idle_s, 0.0
        new = {kind: count - self._told[kind] for kind, count in self.changes.items()}
        self._told = dict(self.changes)
        return idle_s, new

    def _count_idle(self) -> None:
        """Before anybody takes ranks or leaves them."""
        now = time.monotonic()
        if self._ranks and not self._ranks.lost:
            taken = {unit for each in self._journeys.values() if each.at and each.has_ranks for unit in each.at.ranks}
            idle = self._units - len(taken | self._lost_units)
            self._idle_s += idle * self._unit * (now - self._counted_at)
        self._counted_at = now

    @property
    def busy(self) -> float:
        """The share of the ranks that compute."""
        return sum(each.at.size for each in self._journeys.values() if each.at and each.has_ranks) / self._units

    @property
    def has_work(self) -> bool:
        """Whether there are requests, with or without ranks."""
        return bool(self._journeys)

    @property
    def now(self) -> dict[str, Any]:
        """For people: the requests, and how often they have changed their ranks."""
        return {"requests": self.standing, "changes": self.changes, "change_s": round(self.change_s, 4)}

    @property
    def standing(self) -> list[dict[str, Any]]:
        """For people: each request with its ranks, none while it stands still, its steps, and the seconds until it is
        done, if nothing else comes."""
        works = [self._work(each) for each in self._journeys.values()]
        ends_s = forecast(works, self._units, time.monotonic(), self._lost_units)
        return [
            {
                "request_id": name,
                "ranks": list(self._ranks_of(each.at)) if each.at and each.has_ranks else [],
                "step": each.steps_done,
                "total_steps": each.total_steps,
                "eta_s": round(ends_s[name], 3) if self.costs.any_known and name in ends_s else None,
            }
            for name, each in self._journeys.items()
        ]

    def _ranks_of(self, block: Block) -> range:
        return range(block.first * self._unit, (block.first + block.size) * self._unit)

    @property
    def remaining_s(self) -> float:
        """Seconds of work left, if all living ranks shared it: what requests need on as few ranks as they may have. 0
        while no step was measured."""
        if not self.costs.any_known:
            return 0.0
        works = [self._work(each) for each in self._journeys.values()]
        return sum(work.unit_s for work in works) / max(1, self._units - len(self._lost_units))

    @property
    def _lost_units(self) -> Set[int]:
        return {rank // self._unit for rank in self._ranks.gone} if self._ranks else frozenset()

    @property
    def _living_degrees(self) -> list[int]:
        """Those for which some block has lost no rank."""
        lost = self._lost_units
        blocks = ((degree, range(0, self._units, degree)) for degree in self._degrees)
        return [degree for degree, firsts in blocks if any(lost.isdisjoint(Block(i, degree).ranks) for i in firsts)]

    def learned(self, journey: Journey, took: GenerationResult) -> tuple[float, float]:
        """Of a request that is done: the share of the gang that it has had, on average over its time, and the seconds
        of a step at the degree at which it would have been quickest."""
        outside_s = took.encode_seconds + took.decode_seconds  # on as few ranks as a request may have
        seconds = sum(journey.step_s) + outside_s
        unit_s = sum(journey.unit_s) + outside_s * self._degrees[0]
        steps = self.costs.seconds(journey.request, journey.forwards, self._degrees)
        return unit_s / (self._units * seconds) if seconds else 1.0, min(steps.values())

    async def _advance(
        self, ranks: ElasticRankGroup, journey: Journey, block: Block, on_spans: OnSpans
    ) -> AsyncGenerator[Report]:
        """One part of a request, on one block."""
        began, moved = time.monotonic(), journey.before not in (None, block)
        journey.before, journey.stood_since = block, began
        journey.part, journey.at, journey.turn, journey.leaving = journey.part + 1, block, None, False
        journey.computes = True
        part = Part(journey.request.without_data(), journey.part, block.size * self._unit, b"")
        reports = ranks.advance(part, block.first * self._unit, journey.encoded, journey.progress, on_spans)
        first = True
        async with contextlib.aclosing(reports):
            async for report in reports:
                if isinstance(report, StepEvent):
                    if first and moved:
                        self.changes["move"] += 1
                        spent = max(0.0, time.monotonic() - began - report.seconds)
                        self.change_s += WEIGHT * (spent - self.change_s)
                    first = False
                    self._step(journey, report, block)
                    yield report
                elif isinstance(report, Kept):
                    journey.progress, journey.kept_steps = report.progress, report.steps_done
                elif isinstance(report, Drawn):
                    self.costs.observe_tail(journey.request, report.took.decode_seconds)
                    took = replace(report.took, step_seconds=tuple(journey.step_s))
                    yield replace(report, took=took)
                else:
                    yield report
        journey.computes = False

    def _step(self, journey: Journey, event: StepEvent, block: Block) -> None:
        """A step has ended, and the next has begun."""
        self._count_idle()
        journey.stood_since = time.monotonic()
        journey.total_steps, journey.steps_done = event.total_steps, event.step
        new = event.step - len(journey.step_s)
        journey.step_s += [event.seconds] * new
        journey.unit_s += [event.seconds * block.size] * new
        if not journey.request.profile:  # which is slower than others
            self.costs.observe(journey.request, journey.forwards, block.size, event.seconds)
        if event.step == event.total_steps:
            journey.at = Block(block.first, self._degrees[0])  # the first of its ranks decodes, the others are free
            self._deal()
        else:
            self._reconsider(journey)

    def _deal(self) -> None:
        """Give free ranks to those that wait, and ask those that run for ranks that others should have."""
        self._count_idle()
        waiting = [each for each in self._journeys.values() if each.turn and not each.turn.done()]
        if waiting and not self._living_degrees:
            for each in waiting:
                self._turn_away(each)
        elif waiting:
            for name, block in self._dealt(waiting).items():
                journey = self._journeys[name]
                assert journey.turn is not None
                journey.turn.set_result(block)
                journey.at = block
        for journey in list(self._journeys.values()):
            if not journey.turn:
                self._reconsider(journey)

    def _reconsider(self, journey: Journey) -> None:
        """Let a request that runs pause after its step, if the dealer would give it other ranks by now."""
        if journey.leaving or journey.at is None or journey.steps_done + 1 >= journey.total_steps:
            return
        if journey.request.profile:  # of the same ranks from its first step to its last
            return
        # With those that leave already, so that no more are told to than must.
        waiting = [each for each in self._journeys.values() if each.leaving or (each.turn and not each.turn.done())]
        if self._dealt([*waiting, journey]).get(journey.request.request_id) != journey.at:
            assert self._ranks is not None, "it has some"
            self._pause(self._ranks, journey)

    def _dealt(self, waiting: list[Journey]) -> dict[str, Block]:
        lost = self._lost_units
        running = [each for each in self._journeys.values() if each not in waiting]
        return deal(
            [self._work(each) for each in waiting],
            # Those whose ranks are lost know it soon.
            [self._work(each) for each in running if not each.at or lost.isdisjoint(each.at.ranks)],
            self._units,
            time.monotonic(),
            lost,
        )

    def _work(self, journey: Journey) -> Work:
        request = journey.request
        due = None if request.deadline_at is None else time.monotonic() + request.deadline_at - time.time()
        work = Work(
            id=request.request_id,
            arrived=journey.arrived,
            steps_left=max(1, journey.total_steps - journey.steps_done),
            step_s=self.costs.seconds(request, journey.forwards, self._living_degrees or self._degrees),
            due=due,
            tail_s=self.costs.tail(request),
            priority=get_args(Priority).index(request.priority),
            at=journey.at,
            stood_since=journey.stood_since,
            change_s=self.change_s,
        )
        if journey.decodes:  # like one more step, on the ranks that it has
            return replace(work, steps_left=1, step_s={self._degrees[0]: work.tail_s}, tail_s=0.0)
        return work


def _cancelled(request_id: str) -> RequestCancelled:
    return RequestCancelled(f"request {request_id} was canceled")
