"""Processes that wait beside a gang's ranks, to take their places when ranks are lost.

Each has imported what a rank imports, which is most of the time that new ranks take on CPU. It lies in the bundle of
the rank that it would replace and has not touched the device, so it costs memory of the node alone. Used by
`workers.gang.gang` for models with `spare_ranks`.
"""

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayError

from deploy.spec import ModelSpec, Storage
from workers.gang.rank_processes import create

logger = logging.getLogger("ray.serve")

REST_S = 5.0
"""After ranks have started, before spare ones begin to import: the first requests come first."""

ANSWER_S = 3.0
"""A spare process that says nothing for so long is no help."""


class SpareRanks:
    """The spare processes of one gang: one in each bundle, or none.

    Attributes:
        ready: how many have imported their libraries.
    """

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._refilling: asyncio.Task[None] | None = None
        self.ready = 0

    def refill(self, model: ModelSpec, storage: Storage, name: str) -> None:
        """Make the processes in the background, one importing after the other.

        Args:
            model: whose ranks they may become.
            storage: where each node keeps files.
            name: prefix of their names, unique in the cluster.
        """
        self._refilling = asyncio.create_task(self._refill(model, storage, name))

    async def take(self) -> list[Any]:
        """The processes, in the order of their bundles, if all of them live; else none. They may still import."""
        if self._refilling is not None:
            self._refilling.cancel()
        taken, self._processes, self.ready = self._processes, [], 0
        try:
            await asyncio.wait_for(asyncio.gather(*(process.place.remote() for process in taken)), ANSWER_S)
        except (RayError, TimeoutError):
            _kill(taken)
            return []
        return taken

    async def _refill(self, model: ModelSpec, storage: Storage, name: str) -> None:
        await asyncio.sleep(REST_S)
        self._processes = create(model, storage, name, spare=True)
        try:
            for process in self._processes:
                await process.import_libraries.remote(model.elastic is not None)
                self.ready += 1
        except RayError as error:  # the next loss is replaced by new processes
            logger.warning("%s: spare ranks cannot be made: %s", model.name, error)
            _kill(self._processes)
            self._processes, self.ready = [], 0


def _kill(processes: list[Any]) -> None:
    for process in processes:
        ray.kill(process)
