"""Guidance parallelism: the branches of classifier-free guidance run on separate groups of ranks, at once.

Each group of the `cfg` axis evaluates its share of a step's branches, for instance with and without the prompt. Then
all groups exchange their predictions and combine them exactly as one process would. We wrap the guider, the object of
diffusers that makes and combines the branches, not the model. So every kind of guidance works, with any number of
branches, and the number may change from step to step. Called by `workers.model.guidance`.
"""

from typing import Any

from sp_core import collectives, diffusers_private
from sp_core.mesh import MeshAxis


class ParallelGuider:
    """A guider that gives this rank only its group's branches.

    In a step with fewer branches than groups, the spare groups evaluate the first branch again, so that all enter the
    same collectives; their predictions are dropped.

    Args:
        guider: any of `diffusers.guiders`; belongs to one request.
        axis: the groups.
    """

    def __init__(self, guider: Any, axis: MeshAxis) -> None:
        self._guider = guider
        self._axis = axis
        self._branches: list[Any] = []
        self._mine: list[int] = []
        self._prepared = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def set_state(self, *args: Any, **kwargs: Any) -> None:
        """Called by the loop when a step begins."""
        self._prepared = 0
        self._guider.set_state(*args, **kwargs)

    def prepare_inputs(self, data: Any) -> list[Any]:
        """This group's branches of the step."""
        return self._share(self._guider.prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """This group's branches of the step."""
        return self._share(self._guider.prepare_inputs_from_block_state(data, input_fields))

    def prepare_models(self, denoiser: Any) -> None:
        """Called before this group's next branch. The guider identifies a branch by counting these calls."""
        diffusers_private.set_branch(self._guider, self._mine[self._prepared])
        self._prepared += 1
        self._guider.prepare_models(denoiser)

    def __call__(self, data: list[Any]) -> Any:
        """The combined prediction, the same on every group.

        Args:
            data: the branches of `prepare_inputs`, each with its `noise_pred`.
        """
        for turn, branch in enumerate(data):
            for group, prediction in enumerate(collectives.all_gather_equal(branch.noise_pred, self._axis)):
                whose = turn * self._axis.size + group
                if whose < len(self._branches):
                    self._branches[whose].noise_pred = prediction
        return self._guider(self._branches)

    def _share(self, branches: list[Any]) -> list[Any]:
        self._branches = branches
        turns = -(-len(branches) // self._axis.size)
        dealt = (turn * self._axis.size + self._axis.rank for turn in range(turns))
        self._mine = [branch if branch < len(branches) else 0 for branch in dealt]
        return [branches[branch] for branch in self._mine]
