"""Which gang a request goes to: the one with the least backlog in seconds, and a warm one among equals.

Ray Serve runs a `LeastBacklogRouter` per model in every gateway; it is named in the deployment's `RequestRouterConfig`.
It reads what `GangBacklog.as_stats` gave (each gang's `record_routing_stats`, every ten seconds), corrected by what
this gateway itself has sent and seen finished since. `tiers` is the decision and knows nothing of Ray.

A gang takes one request at a time and refuses others, so that requests wait in the gateway, first come first served,
and the routing says which free gang takes the next one. Gangs of other gateways' requests look free until they report:
they refuse, and the next in the ranks is asked. A request that comes while others wait takes its turn, warm or not.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.state.router_registry import register
from workers.gang.cost import shape_of
from workers.gang.stats import GangBacklog
from workers.messages import GenerationRequest

COMPARABLE_S = 2.0
"""Backlogs that differ by no more are equal: a cold shape costs about as much."""

OFFERED = 4
"""Gangs per rank. Serve asks all gangs of a rank whether they are free; with a hundred gangs that must not be all."""

UNKNOWN_S = 60.0
"""Seconds that a request is taken for before its gang has learnt what it costs."""

GangId = TypeVar("GangId")


@dataclass
class Sent:
    """What one gateway knows of a gang beyond its report.

    Attributes:
        running: the request that it sent there and that has not finished; None if there is none.
        sent_at: when, in seconds since the epoch.
        freed_at: when the last one finished; 0 for never.
    """

    running: str | None = None
    sent_at: float = 0.0
    freed_at: float = 0.0


def backlog_s(report: GangBacklog, sent: Sent, now: float) -> float:
    """Seconds until the gang is free, as far as one gateway can tell.

    Args:
        report: the gang's last report.
        sent: what this gateway did since.
        now: seconds since the epoch.
    """
    reported_s = report.backlog_s - (now - report.reported_at) if sent.freed_at < report.reported_at else 0.0
    own_s = 0.0
    if sent.running is not None and sent.sent_at >= report.reported_at:
        own_s = max(COMPARABLE_S * 1.01, (report.request_s or UNKNOWN_S) - (now - sent.sent_at))  # late: still not free
    return max(0.0, reported_s, own_s)


def tiers(gangs: Sequence[GangId], backlogs: Mapping[GangId, float], warm: frozenset[GangId]) -> list[list[GangId]]:
    """The gangs to ask, in ranks; the first rank with a free gang takes the request.

    The least backlog leads. Gangs within `COMPARABLE_S` of it come in two ranks, the warm ones first; what is left
    follows by backlog. Equals keep the order in which they were given: shuffle them, so that two gateways do not run
    for the same one.

    Args:
        gangs: those that may be asked.
        backlogs: seconds until each is free.
        warm: those that have run the request's shape.
    """
    ordered = sorted(gangs, key=lambda gang: backlogs[gang])
    least_s = backlogs[ordered[0]] if ordered else 0.0
    comparable = [gang for gang in ordered if backlogs[gang] <= least_s + COMPARABLE_S]
    ranks = [
        [gang for gang in comparable if gang in warm],
        [gang for gang in comparable if gang not in warm],
        ordered[len(comparable) :],
    ]
    return [some[:OFFERED] for some in ranks if some]


class LeastBacklogRouter(FIFOMixin, RequestRouter):
    """What Serve runs: `RequestRouterConfig(request_router_class="service.routing:LeastBacklogRouter")`."""

    def initialize_state(self, **_kwargs: Any) -> None:
        """Called by Serve once, before any request."""
        self._sent: dict[ReplicaID, Sent] = {}
        register(self.app_name, self)

    def gang_reports(self) -> list[Mapping[str, Any]]:
        """What each running gang last said of itself."""
        return [replica.routing_stats for replica in self.curr_replicas.values() if replica.routing_stats]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The gangs to ask, in ranks. Calls without a `GenerationRequest`, such as for a status, fit any gang."""
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
        shuffled = random.sample(list(replicas), len(replicas))
        return [[replicas[gang] for gang in some] for some in tiers(shuffled, backlogs, warm)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a gang has accepted a request."""
        if pending_request.args and isinstance(pending_request.args[0], GenerationRequest):
            sent = self._sent.setdefault(replica_id, Sent())
            sent.running, sent.sent_at = pending_request.metadata.internal_request_id, time.time()

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request has ended, for whatever reason; also when a gang has refused it."""
        sent = self._sent.get(replica_id)
        if sent is not None and sent.running == internal_request_id:
            sent.running, sent.freed_at = None, time.time()
