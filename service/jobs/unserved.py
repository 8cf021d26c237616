"""Jobs of models that the deployment does not have: given to the model that has their name as an alias, or ended.

The store's counts come in, and go out as they are afterwards. Clusters that share a database do not know each other's
models, and one of them may be away: there nothing is decided at once, and jobs wait a day before they fail. Called by
`service.jobs.runner` every few seconds.
"""

import logging
import time
from collections.abc import Callable, Mapping

from deploy.model_spec import ModelSpec
from service.jobs.patience import UNSERVED_S
from service.jobs.records import Counts
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs

logger = logging.getLogger("ray.serve")

SHARED_UNSERVED_S = 86_400.0
"""How long jobs in a shared database wait for a model that nobody has: the cluster that took them in may be away."""


class Unserved:
    """The models for which jobs wait and that the deployment does not have, as one gateway sees them.

    Args:
        jobs: the store.
        models: of the deployment.
    """

    def __init__(self, jobs: Jobs, models: Callable[[], Mapping[str, ModelSpec]]) -> None:
        self._jobs, self._models = jobs, models
        self._since: dict[str, float] = {}

    async def settle(self, counts: dict[str, Counts]) -> dict[str, Counts]:
        """Rename and end what has waited for long enough.

        Raises:
            JobsUnavailable: the store is away.
        """
        now, models, shared = time.monotonic(), self._models(), self._jobs.shared
        gone = [model for model, found in counts.items() if found.queued and model not in models]
        self._since = {model: self._since.get(model, now) for model in gone}
        aliases = {alias: name for name, spec in models.items() for alias in spec.aliases}
        for model, since in list(self._since.items()):
            waited = now - since
            if model in aliases and (not shared or waited >= UNSERVED_S):
                unless_begun = UNSERVED_S if shared else 0.0
                if await self._jobs.ask(JobStore.rename_model, model, aliases[model], unless_begun):
                    counts = await self._jobs.ask(JobStore.counts)
            elif waited >= (SHARED_UNSERVED_S if shared else UNSERVED_S):
                await self._end(model, SHARED_UNSERVED_S if shared else UNSERVED_S)
        return counts

    async def _end(self, model: str, after_s: float) -> None:
        if ended := await self._jobs.ask(JobStore.end_unserved, model, after_s):
            logger.warning("%d jobs have failed: the deployment has no model %r anymore", ended, model)
