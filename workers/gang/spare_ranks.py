"""Processes that wait beside a gang's ranks, to take their places when ranks are lost.

Each has imported what a rank imports, which is most of the time that new ranks take on CPU. It lies in the bundle of
the rank that it would replace and has not touched the device, so it costs memory of the node alone. Used by
`workers.gang.gang` for models with `spare_ranks`, and for elastic ones that have lost some ranks while others go on.
"""

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayError

from deploy.model_spec import ModelSpec
from deploy.storage_spec import Storage
from workers.gang.rank_processes import FIRST_WORD_S, create

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
        self._patience_s = ANSWER_S
        self.ready = 0

    def refill(self, model: ModelSpec, storage: Storage, name: str) -> None:
        """Make the processes in the background, one importing after the other.

        Args:
            model: whose ranks they may become.
            storage: where each node keeps files.
            name: prefix of their names, unique in the cluster.
        """
        self._refilling, self._patience_s = asyncio.create_task(self._refill(model, storage, name, REST_S)), ANSWER_S

    def hurry(self, model: ModelSpec, storage: Storage, name: str) -> None:
        """Make them now, if there are none: they are needed soon. Arguments are those of `refill`."""
        if self._processes:
            return
        if self._refilling is not None:
            self._refilling.cancel()
        self._refilling = asyncio.create_task(self._refill(model, storage, name, 0.0))
        self._patience_s = FIRST_WORD_S  # they may have just begun

    async def take(self) -> list[Any]:
        """The processes, in the order of their bundles, if all of them live; else none. They may still import."""
        if self._refilling is not None:
            self._refilling.cancel()
        taken, self._processes, self.ready = self._processes, [], 0
        try:
            await asyncio.wait_for(asyncio.gather(*(process.place.remote() for process in taken)), self._patience_s)
        except (RayError, TimeoutError):
            _kill(taken)
            return []
        return taken

    async def _refill(self, model: ModelSpec, storage: Storage, name: str, rest_s: float) -> None:
        await asyncio.sleep(rest_s)
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
