"""Prefetch: models from the hub are on a node before a gang is. For `service.gateway`, which follows its models here.

`spray deploy` has every node fetch before it tells Serve; this is for nodes that join later, and for deployments that
came another way. Whoever comes first on a node fetches, and the others wait for it: see `workers.model.files`.
"""

import asyncio
import logging
from collections.abc import Collection
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.spec import ModelSpec
from workers.gang.placement import hosts
from workers.model.files import fetch

logger = logging.getLogger("ray.serve")

PERIOD_S = 5.0


class Prefetch:
    """Lets every node that may run a gang of a model fetch it, once."""

    def __init__(self) -> None:
        self._models: Collection[ModelSpec] = ()
        self._models_folder: str | None = None
        self._asked: set[tuple[str, str, str | None]] = set()
        self._coming: dict[Any, str] = {}
        self._looking: asyncio.Task[None] | None = None

    def follow(self, models: Collection[ModelSpec], models_folder: str | None) -> None:
        """See to these models from now on.

        Args:
            models: of which those in folders need nothing.
            models_folder: `storage.models`.
        """
        self._models, self._models_folder = [model for model in models if model.from_hub], models_folder
        if self._models:
            self._looking = self._looking or asyncio.create_task(self._look_for_ever())

    async def _look_for_ever(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.look)
            except Exception as error:
                logger.warning("nodes cannot be asked to fetch models: %s", error)
            await asyncio.sleep(PERIOD_S)

    def look(self) -> None:
        """Ask the nodes that were not asked yet; say what could not be fetched."""
        for model in self._models:
            for node_id in hosts(model):
                wanted = node_id, model.source, model.revision
                if wanted not in self._asked:
                    self._asked.add(wanted)
                    on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
                    asked = _fetch.options(scheduling_strategy=on_node).remote(model, self._models_folder)
                    self._coming[asked] = node_id
        done, _ = ray.wait(list(self._coming), num_returns=len(self._coming), timeout=0) if self._coming else ([], [])
        for asked in done:
            node_id = self._coming.pop(asked)
            try:
                said = ray.get(asked)
            except RayError as error:
                said = str(error).splitlines()[0]
            if said:
                logger.warning("node %s: %s; its gangs will try again", node_id[:8], said)


@ray.remote(num_cpus=0)
def _fetch(model: ModelSpec, models_folder: str | None) -> str:
    """Why the model cannot be had on this node; empty when it is there."""
    try:
        fetch(model, models_folder)
    except (ValueError, OSError) as error:
        return str(error)
    return ""
