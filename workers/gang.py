"""Gang: one model copy on N ranks. The Serve deployment whose replicas are the unit of scheduling and of failure.

A `ModelSpec` comes in; its ranks start in the replica's own placement group, and then requests are taken one at a
time. Called by `service.gateway`.

When the ranks are lost, as many new processes take their places on the same devices; that takes seconds, and keeps
the placement. When it fails, or happens again and again, the replica ends, and Serve places a whole new gang.
"""

import asyncio
import contextvars
import itertools
import logging
import os
from collections.abc import AsyncIterator

from ray import serve

from deploy.spec import ModelSpec
from workers.messages import GenerationRequest, GenerationResult
from workers.rank_group import RankGroup, Report

logger = logging.getLogger("ray.serve")

LOSSES_IN_PLACE = 3
"""How often in a row, without a finished request between, lost ranks are replaced on the same devices. As often as the
gateway tries one request, so that no single request can bring a replica down."""


class Gang:
    """All ranks of one model copy.

    Args:
        model: what to serve and on how many ranks.

    Raises:
        GangLost: a rank did not start, or could not load the model, within the start-up limit.
    """

    async def __init__(self, model: ModelSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        self._model = model
        self._turn = asyncio.Lock()
        self._losses = 0
        self._incarnation = itertools.count(1)
        self._context = contextvars.copy_context()  # ranks must not belong to the request that happens to lose them
        self._ranks = await self._start_ranks()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Report]:
        """Run one request on all ranks: a `StepEvent` after each step, the result at last.

        Raises:
            RequestError: the request does not suit the model.
            RequestFailed: it failed, or was cancelled; the ranks go on.
            GangLost: the ranks are lost; the request can run again.
        """
        async with self._turn:
            async for report in self._ranks.run(request):
                if isinstance(report, GenerationResult):
                    self._losses = 0
                yield report

    async def check_health(self) -> None:
        """Called by Serve every second.

        Raises:
            GangLost: nobody watches the ranks any more; Serve replaces the whole gang then.
        """
        self._ranks.check_watched()

    async def _start_ranks(self) -> RankGroup:
        replica = serve.get_replica_context().replica_id.unique_id
        name = f"{self._model.name}-{replica}-{next(self._incarnation)}"
        return await RankGroup.start(self._model, name, self._on_lost)

    def _on_lost(self) -> None:
        self._losses += 1
        self._replacement = asyncio.create_task(self._replace_ranks(), context=self._context)

    async def _replace_ranks(self) -> None:
        async with self._turn:  # requests wait meanwhile
            if self._losses <= LOSSES_IN_PLACE:
                try:
                    self._ranks = await self._start_ranks()
                    logger.warning("%s: all ranks are replaced", self._model.name)
                    return
                except Exception:
                    logger.exception("%s: the ranks cannot be replaced", self._model.name)
            logger.error("%s: the gang ends, so that Serve places another", self._model.name)
            os._exit(1)
