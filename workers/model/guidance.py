"""How a request evaluates the branches of guidance: in one forward, in a forward each, or each on ranks of its own.

The deployment's setting, the size of the request and the model's classes come in; a guider goes out. At each step the
lengths of the prompts decide too. `workers.model.denoising` calls `Guidance`, `workers.model.loader` calls
`why_not_batched`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from deploy.activations import Request, why_two_forwards
from deploy.model_spec import ModelSpec
from sp_core.batched_guidance import BatchedGuider, guidance_batch
from sp_core.cfg_parallel import ParallelGuider
from sp_core.mesh import ParallelMesh
from workers.messages import GenerationRequest


class Guidance:
    """The guidance of one request.

    Args:
        model: the model; its `source` is a folder of this node.
        request: what to draw.
        transformers: the transformers that denoise.
        mesh: the ranks of the request. In an elastic gang they may be fewer than the deployment says.
        guided: whether the request has two branches.
    """

    def __init__(
        self,
        model: ModelSpec,
        request: GenerationRequest,
        transformers: Iterable[nn.Module],
        mesh: ParallelMesh,
        guided: bool,
    ) -> None:
        transformers = list(transformers)
        size = Request(request.width, request.height, request.num_frames, request.n)
        self._groups, self._guided = mesh.axis("cfg"), guided
        if model.elastic:
            model = model.model_copy(update={"parallel": mesh.degrees})
        self._apart = why_two_forwards(model, Path(model.source), size) or why_not_batched(transformers)
        self._batch = guidance_batch(transformers[0])
        self._batched: list[BatchedGuider] = []

    def arranged(self, guider: Any) -> Any:
        """The guider for the pipeline, made from the adapter's."""
        if self._guided and self._groups.size > 1:
            return ParallelGuider(guider, self._groups)
        if not self._guided or self._apart or self._batch is None:
            return guider
        self._batched.append(BatchedGuider(guider, self._batch))
        return self._batched[-1]

    def __str__(self) -> str:
        """How the steps so far evaluated the branches, and why; empty: the request has one branch."""
        if not self._guided or self._groups.size > 1:
            return "each branch on ranks of its own" if self._guided else ""
        apart = self._apart or next((guider.apart for guider in self._batched if guider.apart), "")
        return f"two forwards: {apart}" if apart else "one forward"


def why_not_batched(transformers: Iterable[nn.Module]) -> str:
    """Why the branches of these transformers cannot be one batch; empty: they can."""
    found = {type(each).__name__: guidance_batch(each) for each in transformers}
    if None not in found.values() and len(set(found.values())) == 1:
        return ""
    return f"nothing says how branches become one batch of {' and '.join(sorted(found))}"
