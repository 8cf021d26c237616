"""Which gang a request goes to: the one that `service.state.turns` gives it when its turn comes.

Ray Serve runs a `LeastBacklogRouter` per model in every gateway, as the deployment's `RequestRouterConfig` names it. A
request waits here, in Serve's own queue, so that waiting work drives the autoscaler and wakes a model that sleeps. When
its turn comes it is sent to the gang; a gang that is busy after all refuses it, and it asks for another turn.
"""

import asyncio
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.state.router_registry import register
from service.state.shared_turns import SharedTurns
from service.state.tickets import Prospect, Takes, Ticket, Turn
from service.state.waiting import waiting_for
from workers.gang.cost import Costs, shape_of
from workers.gang.stats import GangBacklog
from workers.messages import GenerationRequest


class LeastBacklogRouter(RequestRouter):
    """What Serve runs, by name: `RequestRouterConfig(request_router_class="service.routing:LeastBacklogRouter")`."""

    def initialize_state(self, **_kwargs: Any) -> None:
        """Called by Serve once, before any request."""
        self._turns = SharedTurns(self.app_name)
        self._given: dict[str, Turn] = {}  # by Serve's id of the request: sent there, not yet accepted
        self._accepted: dict[tuple[str, str], Turn] = {}  # by gang and that id
        self._costs: list[Costs] = []  # of the gangs that know any
        self._loop: asyncio.AbstractEventLoop | None = None
        register(self.app_name, self)

    def gang_reports(self) -> list[Mapping[str, Any]]:
        """The last report of each running gang."""
        return [replica.routing_stats for replica in list(self.curr_replicas.values()) if replica.routing_stats]

    def takes(self, request: GenerationRequest) -> Takes:
        """What a request would take. Called by the gateway, on its own loop."""
        least = [seconds for costs in self._costs if (seconds := costs.least_seconds(request))]
        return Takes(self._usual(request)[0], min(least, default=0.0))

    def _usual(self, request: GenerationRequest) -> tuple[float, float]:
        """Seconds that a request takes, and seconds of a whole gang that it costs; 0: nobody knows."""
        usual = [told for costs in self._costs if (told := costs.seconds_and_share(request))[0]]
        if not usual:
            return 0.0, 0.0
        return statistics.fmean(s for s, _ in usual), statistics.fmean(s * share for s, share in usual)

    async def prospect(self, caller: str) -> Prospect:
        """What a new request of this caller would have to wait for. Called by the gateway, on its own loop."""
        if self._loop is None:
            return Prospect(0, 0.0)
        asked = asyncio.run_coroutine_threadsafe(self._turns.prospect(caller), self._loop)
        return await asyncio.wrap_future(asked)

    async def standing(self, request_id: str) -> Prospect | None:
        """What a request that waits still has to wait for. Called by the gateway, on its own loop."""
        if self._loop is None:
            return None
        asked = asyncio.run_coroutine_threadsafe(self._turns.standing(request_id), self._loop)
        return await asyncio.wrap_future(asked)

    def lose(self, request_id: str) -> None:
        """Called by the gateway when a request has lost its ranks."""
        self._on_loop(self._turns.lose, request_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when gangs come, go or report."""
        super().update_replicas(replicas)
        self._loop = asyncio.get_running_loop()
        told = (Costs.from_stats(each.routing_stats.get("costs", {})) for each in replicas)
        self._costs = [costs for costs in told if costs.known]
        self._turns.know({each.replica_id.unique_id: GangBacklog.from_stats(each.routing_stats) for each in replicas})

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a gang is gone, before the news comes from the controller."""
        super().on_replica_actor_died(replica_id)
        self._on_loop(lambda: self.update_replicas(list(self.curr_replicas.values())))

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Wait for the request's turn. Called again if the gang did not take the request."""
        request = pending_request.args[0] if pending_request.args else None
        if not isinstance(request, GenerationRequest):  # such as a call for a status, which suits any gang
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        internal = pending_request.metadata.internal_request_id
        if before := self._given.pop(internal, None):
            self._turns.end(before, refused=True)
        ticket = self._ticket(request, pending_request.created_at)
        while True:
            turn = await self._turns.take(ticket)
            for replica in list(self.curr_replicas.values()):
                if replica.replica_id.unique_id == turn.gang:
                    self._given[internal] = turn
                    return replica
            self._turns.end(turn, refused=True)  # another gateway has heard of it first

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """For calls that are no generation: any gang."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
        return [candidate_replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a gang has accepted a request."""
        internal = pending_request.metadata.internal_request_id
        if turn := self._given.pop(internal, None):
            self._accepted[replica_id.unique_id, internal] = turn
        if pending_request.args and isinstance(pending_request.args[0], GenerationRequest):
            waiting_for(self.app_name).leave(pending_request.args[0].request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request has ended for any reason, also when a gang has refused it; on any thread."""
        self._on_loop(self._complete, replica_id.unique_id, internal_request_id)

    def _complete(self, gang: str, internal: str) -> None:
        turn = self._accepted.pop((gang, internal), None)
        given = self._given.get(internal)
        if turn is None and given is not None and given.gang == gang:  # its caller left before the gang took it
            turn = self._given.pop(internal)
        if turn is not None:
            self._turns.end(turn)

    def _ticket(self, request: GenerationRequest, created_at: float) -> Ticket:
        place = waiting_for(self.app_name).place(request.request_id)
        return Ticket(
            request_id=request.request_id,
            caller=place.caller if place else "",
            cost=float(request.work),
            place=place.admitted_at if place else created_at,
            shape=shape_of(request),
            seconds=self._usual(request)[1],
        )

    def _on_loop(self, call: Callable[..., None], *args: Any) -> None:
        """Call it on the loop that routes. Before there is one, nothing has been routed."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(call, *args)
