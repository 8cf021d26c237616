"""Which gang a request goes to: the one with the least backlog in seconds; among equals, a warm one.

Ray Serve runs a `LeastBacklogRouter` per model in every gateway, as the deployment's `RequestRouterConfig` names it.
The router reads each gang's last report (`GangBacklog.as_stats`, from `record_routing_stats`) and corrects it by what
its own gateway has sent and seen finished since then. `tiers` makes the decision and knows nothing of Ray.

A gang accepts one request at a time and refuses others. So requests wait in the gateway, first come, first served, and
the router decides which free gang takes the next one. A gang that replaces its ranks gets none while others run. A gang
that works for another gateway looks free until it reports: it refuses, and the next in the tiers is asked. A request
takes its turn even if a warm gang is free sooner. One that lost its gang keeps the place that it had.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.state.router_registry import register
from service.state.waiting import waiting_for
from workers.gang.cost import shape_of
from workers.gang.stats import GangBacklog
from workers.messages import GenerationRequest

COMPARABLE_S = 2.0
"""Backlogs that differ by at most this count as equal: a cold shape costs about as much."""

OFFERED = 4
"""Gangs per tier. Serve asks every gang of a tier if it is free; out of a hundred gangs, only a few may be asked."""

UNKNOWN_S = 60.0
"""Assumed seconds of a request whose gang has not learned yet what a request costs."""

GangId = TypeVar("GangId")


@dataclass
class Sent:
    """What one gateway knows of a gang beyond the gang's report.

    Attributes:
        running: id of the unfinished request that it sent there; None if there is none.
        sent_at: when it was sent, in seconds since the epoch.
        freed_at: when the last one finished, in seconds since the epoch; 0 for never.
        request_id: of the last `GenerationRequest`.
        lost_at: when a request lost its ranks there, in seconds since the epoch; 0 for never.
    """

    running: str | None = None
    sent_at: float = 0.0
    freed_at: float = 0.0
    request_id: str = ""
    lost_at: float = 0.0


def backlog_s(report: GangBacklog, sent: Sent, now: float) -> float:
    """Seconds until the gang is free, to the knowledge of one gateway.

    Args:
        report: the gang's last report.
        sent: what this gateway knows beyond the report.
        now: seconds since the epoch.
    """
    reported_s = report.backlog_s - (now - report.reported_at) if sent.freed_at < report.reported_at else 0.0
    own_s = 0.0
    if sent.running is not None and sent.sent_at >= report.reported_at:
        own_s = max(COMPARABLE_S * 1.01, (report.request_s or UNKNOWN_S) - (now - sent.sent_at))  # overdue: still busy
    return max(0.0, reported_s, own_s)


def is_lost(report: GangBacklog, sent: Sent) -> bool:
    """True while the gang replaces its ranks, to the knowledge of one gateway."""
    return report.replacing or sent.lost_at > report.reported_at


def tiers(gangs: Sequence[GangId], backlogs: Mapping[GangId, float], warm: frozenset[GangId]) -> list[list[GangId]]:
    """The gangs to ask, in tiers. A request goes to the first tier with a free gang.

    Gangs within `COMPARABLE_S` of the least backlog come first, in two tiers: the warm ones, then the others. The rest
    follows by backlog. Equals keep their order: shuffle them first, so that two gateways do not rush to the same one.

    Args:
        gangs: those that may be asked.
        backlogs: seconds until each is free.
        warm: those that have run the request's shape.
    """
    ordered = sorted(gangs, key=lambda gang: backlogs[gang])
    least_s = backlogs[ordered[0]] if ordered else 0.0
    comparable = [gang for gang in ordered if backlogs[gang] <= least_s + COMPARABLE_S]
    ordered_tiers = [
        [gang for gang in comparable if gang in warm],
        [gang for gang in comparable if gang not in warm],
        ordered[len(comparable) :],
    ]
    return [tier[:OFFERED] for tier in ordered_tiers if tier]


class LeastBacklogRouter(FIFOMixin, RequestRouter):
    """What Serve runs, by name: `RequestRouterConfig(request_router_class="service.routing:LeastBacklogRouter")`."""

    def initialize_state(self, **_kwargs: Any) -> None:
        """Called by Serve once, before any request."""
        self._sent: dict[ReplicaID, Sent] = {}
        register(self.app_name, self)

    def gang_reports(self) -> list[Mapping[str, Any]]:
        """The last report of each running gang."""
        return [replica.routing_stats for replica in self.curr_replicas.values() if replica.routing_stats]

    def lose(self, request_id: str) -> None:
        """Called by the gateway when a request has lost its ranks."""
        for sent in list(self._sent.values()):  # the router adds to it in another thread
            if sent.request_id == request_id:
                sent.request_id, sent.lost_at = "", time.time()

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Queue a request by its place, where Serve would append it: one that lost its gang has waited before."""
        request = pending_request.args[0] if pending_request.args else None
        place = waiting_for(self.app_name).place(request.request_id) if isinstance(request, GenerationRequest) else None
        pending_request.created_at = place or pending_request.created_at
        return await super()._choose_replica_for_request(pending_request, is_retry=True)  # sorted by `created_at`

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The gangs to ask, in tiers. A call without a `GenerationRequest`, such as for a status, suits any gang."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
        request = pending_request.args[0] if pending_request is not None and pending_request.args else None
        shape = shape_of(request) if isinstance(request, GenerationRequest) else None
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        self._sent = {gang: sent for gang, sent in self._sent.items() if gang in replicas or sent.running}
        reports = {gang: GangBacklog.from_stats(replica.routing_stats) for gang, replica in replicas.items()}
        now = time.time()
        backlogs = {gang: backlog_s(report, self._sent.get(gang, Sent()), now) for gang, report in reports.items()}
        warm = frozenset(gang for gang, report in reports.items() if shape in report.shapes)
        lost = {gang for gang, report in reports.items() if is_lost(report, self._sent.get(gang, Sent()))}
        takers = [gang for gang in replicas if gang not in lost] or list(replicas)  # all lost: wait where ranks start
        shuffled = random.sample(takers, len(takers))
        return [[replicas[gang] for gang in tier] for tier in tiers(shuffled, backlogs, warm)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a gang has accepted a request."""
        if pending_request.args and isinstance(pending_request.args[0], GenerationRequest):
            sent = self._sent.setdefault(replica_id, Sent())
            sent.running, sent.sent_at = pending_request.metadata.internal_request_id, time.time()
            sent.request_id = pending_request.args[0].request_id
            waiting_for(self.app_name).leave(sent.request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request has ended for any reason, also when a gang has refused it."""
        sent = self._sent.get(replica_id)
        if sent is not None and sent.running == internal_request_id:
            sent.running, sent.freed_at = None, time.time()
