"""What a gang knows of its model and its place once Serve has configured it.

Kept up to date by `workers.gang.gang`, read by `workers.gang.supervisor` and `workers.gang.gang_report`.
"""

import contextvars
import dataclasses
from typing import Any

from deploy.families.family import PipelineFamily
from deploy.model_spec import ModelSpec
from deploy.storage_spec import Storage
from workers.gang.adapter_sync import AdapterSync
from workers.messages import GenerationRequest
from workers.observing import GangMetrics


@dataclasses.dataclass
class Setup:
    """What the first `reconfigure` settles. Later ones adjust it: model, metrics and where they are.

    Attributes:
        model: as it is deployed. Its revision is the commit that was fetched.
        adapters: those of the model, and those that the ranks have.
        family: what is known of the model's pipeline.
        storage: where each node keeps files.
        context: of the start. Whatever outlives a request must run in it: Ray cancels what a canceled request started.
        metrics_at: arguments of `Exporter.serve_at`.
        metrics: where the gang observes, under its current number.
    """

    model: ModelSpec
    adapters: AdapterSync
    family: PipelineFamily
    storage: Storage
    context: contextvars.Context
    metrics_at: dict[str, Any]
    metrics: GangMetrics

    def forwards(self, request: GenerationRequest) -> int:
        """Of the transformer in one step."""
        return self.family.branches(request.guidance_scale, request.negative_prompt)
