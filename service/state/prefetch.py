"""Fetches hub models onto nodes before a gang needs them. For `service.gateway`.

`spray deploy` makes every node fetch before it changes Serve. This module is for nodes that join later, and for
deployments that were made in another way. The first process on a node fetches a model, and the others wait: see
`workers.model.files`.
"""

import asyncio
import logging
from collections.abc import Collection
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.model_spec import ModelSpec
from workers.gang.placement import hosts
from workers.model.files import fetch

logger = logging.getLogger("ray.serve")

PERIOD_S = 5.0


class Prefetch:
    """Asks every node that may run a gang of a model to fetch it, once."""

    def __init__(self) -> None:
        self._models: Collection[ModelSpec] = ()
        self._models_folder: str | None = None
        self._requested: set[tuple[str, str, str | None]] = set()
        self._fetching: dict[Any, str] = {}
        self._polling: asyncio.Task[None] | None = None

    def follow(self, models: Collection[ModelSpec], models_folder: str | None) -> None:
        """Prefetch these models from now on.

        Args:
            models: the models; those in folders are skipped.
            models_folder: `storage.models`.
        """
        self._models, self._models_folder = [model for model in models if model.from_hub], models_folder
        if self._models:
            self._polling = self._polling or asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.poll)
            except Exception as error:
                logger.warning("nodes cannot be asked to fetch models: %s", error)
            await asyncio.sleep(PERIOD_S)

    def poll(self) -> None:
        """Ask the nodes that were not asked yet, and log what could not be fetched.

        It never waits for a fetch, so that a node that joins is asked within a period, however long the others take.
        """
        for model in self._models:
            for node_id in hosts(model):
                request = node_id, model.source, model.revision
                if request not in self._requested:
                    self._requested.add(request)
                    on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
                    task = _fetch.options(scheduling_strategy=on_node).remote(model, self._models_folder)
                    self._fetching[task] = node_id
        fetching = list(self._fetching)
        done, _ = ray.wait(fetching, num_returns=len(fetching), timeout=0) if fetching else ([], [])
        for task in done:
            node_id = self._fetching.pop(task)
            try:
                failure = ray.get(task)
            except RayError as error:
                failure = str(error).splitlines()[0]
            if failure:
                logger.warning("node %s: %s; its gangs will try again", node_id[:8], failure)


@ray.remote(num_cpus=0)
def _fetch(model: ModelSpec, models_folder: str | None) -> str:
    """On a node: fetch the model, and return why that failed; empty if it succeeded."""
    try:
        fetch(model, models_folder)
    except (ValueError, OSError) as error:
        return str(error)
    return ""
