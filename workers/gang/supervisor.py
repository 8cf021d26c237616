"""Supervisor: starts the ranks of one gang, gives turns on them, and replaces those that are lost.

`workers.gang.gang` makes one, and runs each request in a turn. New processes or spare ones take the places of lost
ranks, on the same devices. That takes seconds and keeps the placement. If it fails, or happens again and again, the
replica exits, and Serve places a whole new gang. When an elastic gang loses some of its ranks, all are replaced, but
first what it has goes on on the others.
"""

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import AsyncIterator
from typing import cast

from ray import serve

from workers.gang.elastic import Elastic
from workers.gang.elastic_rank_group import ElasticRankGroup
from workers.gang.rank_group import RankGroup
from workers.gang.rank_processes import create
from workers.gang.setup import Setup
from workers.gang.spare_ranks import SpareRanks
from workers.gang.turn import Turn
from workers.messages import GenerationRequest, RankStatus
from workers.metrics import Loss

logger = logging.getLogger("ray.serve")

LOSSES_IN_PLACE = 4
"""How often in a row, with no request finished in between, lost ranks are replaced on the same devices. As often as
the gateway tries one request, times the tries of an elastic gang, so that no single request can end a replica."""


class Supervisor:
    """The ranks of one gang.

    Args:
        setup: of the gang.
        elastic: its requests, if it is elastic.

    Attributes:
        ranks: None until they have started; afterwards the current ones, even when lost.
        running: the request that has them; of an elastic gang, the latest.
        spares: what would take their places.
    """

    def __init__(self, setup: Setup, elastic: Elastic | None) -> None:
        self.ranks: RankGroup | None = None
        self.running: GenerationRequest | None = None
        self.spares = SpareRanks()
        self._setup, self._elastic = setup, elastic
        self._turn = Turn()
        self._incarnation = itertools.count(1)
        self._losses = 0
        self._replacement: asyncio.Task[None] | None = None  # also while it runs, as a reference that keeps it alive
        self._whole = asyncio.Event()  # unset while lost ranks are replaced
        self._whole.set()

    async def start(self) -> None:
        """Start the first ranks.

        Raises:
            GangLost: a rank did not start, or could not load the model, within the start-up limit.
        """
        await self._renew_ranks()

    @contextlib.asynccontextmanager
    async def turn(self, request: GenerationRequest) -> AsyncIterator[RankGroup]:
        """A turn on sound ranks. Lost ones fail no request that had not begun: it waits until they are replaced."""
        while True:
            await self._whole.wait()
            async with self._turn.shared() if self._elastic else self._turn.alone():
                if self.replacing:
                    continue
                ranks, self.running = self.ranks, request
                assert ranks is not None, "Serve configures a replica before it sends requests"
                try:
                    await ranks.room()
                    if not self.replacing:
                        yield ranks
                        return
                finally:
                    if self.running is request:
                        self.running = None

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[RankGroup | None]:
        """The ranks, between requests; None: they are lost."""
        async with self._turn.alone():
            yield None if self.replacing else self.ranks

    @property
    def replacing(self) -> bool:
        """Whether ranks are lost and not replaced yet."""
        return not self._whole.is_set()

    @property
    def living(self) -> list[RankStatus]:
        """What ranks have said last that are not lost."""
        return self.ranks.living if self.ranks else []

    @property
    def startup_s(self) -> float:
        """Seconds that the latest ranks took to start; 0 before there are any."""
        return self.ranks.startup_s if self.ranks else 0.0

    async def _renew_ranks(self) -> None:
        self.ranks = await self._start_ranks()
        if self._elastic:
            self._elastic.follow(cast("ElasticRankGroup", self.ranks))

    async def _start_ranks(self) -> RankGroup:
        setup = self._setup
        name, number = self._name(), setup.metrics.replica
        tested = self.ranks is not None  # of replacements only the groups are tried
        model = setup.model.model_copy(
            update={"loras": setup.adapters.start_over(), "self_test": setup.model.self_test and not tested}
        )
        processes = await self.spares.take() or create(model, setup.storage, name)
        kind = RankGroup if model.elastic is None else ElasticRankGroup
        ranks = await kind.start(model, processes, number, self._on_lost)
        if model.spare_ranks:
            self.spares.refill(model, setup.storage, name)
        setup.metrics.started(ranks.phases)
        ranks.serve_metrics(**setup.metrics_at)
        if number != setup.metrics.replica:  # a `reconfigure` came while they started
            ranks.renumber(setup.metrics.replica)
        return ranks

    def _name(self) -> str:
        """A new prefix for names of processes, unique in the cluster."""
        replica = serve.get_replica_context().replica_id.unique_id
        return f"{self._setup.model.name}-{replica}-{next(self._incarnation)}"

    def _on_lost(self, kind: Loss) -> None:
        """Replace the ranks in the next turn."""
        self._setup.metrics.lost(kind)
        if self.replacing:  # these had outlived others
            return
        answered = self.ranks is not None and self.ranks.has_answered
        self._losses = 1 if answered else self._losses + 1
        self._whole.clear()
        self._replacement = asyncio.create_task(self._replace_ranks(), context=self._setup.context)

    async def _replace_ranks(self) -> None:
        name = self._setup.model.name
        assert self.ranks is not None, "they were lost"
        leaving = self._go_on(self.ranks)
        async with self._turn.alone():  # requests that come from now on wait for the new ranks
            leaving.cancel()
            await self.ranks.end()
            if self._losses <= LOSSES_IN_PLACE:
                try:
                    await self._renew_ranks()
                    self._whole.set()
                except Exception:
                    logger.exception("%s: the ranks cannot be replaced", name)
                else:
                    logger.warning("%s: all ranks are replaced", name)
                    await self._setup.adapters.apply(name, self.ranks)
                    return
            logger.error("%s: the replica exits, so that Serve places a new gang", name)
            os._exit(1)  # at once: an orderly end would wait for requests that cannot finish

    def _go_on(self, ranks: RankGroup) -> asyncio.TimerHandle:
        """Requests go on on the ranks that live, if any, while processes start that will take the places of all.

        They leave them at the latest when they have had as long as the start of ranks takes: so nobody waits for more
        than twice of that, and who stands still for it would have had more than that left.
        """
        if self._elastic and self._elastic.has_work and self.living:
            self.spares.hurry(self._setup.model, self._setup.storage, self._name())
        leave = self._elastic.leave if self._elastic else lambda _: None
        return asyncio.get_running_loop().call_later(self.startup_s, leave, cast("ElasticRankGroup", ranks))
