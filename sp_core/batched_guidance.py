"""Both branches of classifier-free guidance in one forward, if their prompts have the same length.

The branches see the same latents at the same time and differ only in their prompts, so they can be one batch: half as
many launches and collectives, each weight read once, the same arithmetic, twice the activations. A mask would cost
every layer the fast attention, and padding may change the answer, so prompts of unequal lengths take a forward each.

We wrap the guider, as `sp_core.cfg_parallel` does. The wrapper joins all branches into one; while that one runs, a hook
of the model repeats the inputs that the branches have in common. The hook exists for this forward only. `GuidanceBatch`
in a family's file says what is repeated. Called by `workers.model.guidance`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sp_core import diffusers_private
from sp_core.models.family import GuidanceBatch
from sp_core.models.lookup import find_family


def guidance_batch(model: nn.Module) -> GuidanceBatch | None:
    """How a model's branches become one batch; None: it is not declared. A subclass may have another forward."""
    kind = type(model)
    family = find_family([kind.__name__]) if kind.__module__.startswith("diffusers.") else None
    return family.guidance_batch if family else None


class BatchedGuider:
    """A guider whose branches go through the model together.

    The branches may differ from step to step. A guider that changes the model from branch to branch, such as one that
    skips layers, is left as it is.

    Args:
        guider: any of `diffusers.guiders`; belongs to one request.
        batch: which inputs the branches have in common.

    Attributes:
        apart: why the branches of the latest step took a forward each; empty if they shared one.
    """

    def __init__(self, guider: Any, batch: GuidanceBatch) -> None:
        self._guider = guider
        self._batch = batch
        self._branches: list[Any] = []
        self._together = False
        self.apart = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def prepare_inputs(self, data: Any) -> list[Any]:
        """One branch for all of the step, or each."""
        return self._join(self._guider.prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """One branch for all of the step, or each."""
        return self._join(self._guider.prepare_inputs_from_block_state(data, input_fields))

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Called by the loop before a forward."""
        for _ in self._branches if self._together else (0,):
            self._guider.prepare_models(denoiser)  # which counts
        if self._together:
            _Repeat(denoiser, self._batch, len(self._branches))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Called by the loop after a forward."""
        for _ in self._branches if self._together else (0,):
            self._guider.cleanup_models(denoiser)

    def __call__(self, data: Sequence[Any]) -> Any:
        """The combined prediction.

        Args:
            data: the result of `prepare_inputs`, each entry with the `noise_pred`, `(B, ...)`, of its branches.
        """
        if self._together:
            (whole,) = data
            for branch, prediction in zip(self._branches, whole.noise_pred.chunk(len(self._branches)), strict=True):
                branch.noise_pred = prediction
        return self._guider(self._branches)

    def _join(self, branches: list[Any]) -> list[Any]:
        self._branches, self._together = branches, False
        self.apart = self._why_apart(branches) if len(branches) > 1 else ""
        if len(branches) < 2 or self.apart:
            return branches
        self._together = True
        prompts = [branch[self._batch.prompt] for branch in branches]
        listed = isinstance(prompts[0], list)
        whole: Any = list(itertools.chain(*prompts)) if listed else torch.cat(prompts)
        first = branches[0]
        return [type(first)(**first.as_dict() | {self._batch.prompt: whole})]

    def _why_apart(self, branches: list[Any]) -> str:
        if diffusers_private.changes_model(self._guider):
            return f"{type(self._guider).__name__} changes the model for each branch"
        for name, value in ((name, value) for branch in branches for name, value in branch.as_dict().items()):
            if name != self._batch.prompt and isinstance(value, torch.Tensor | list | tuple):
                return f"each branch has {name} besides its prompt"  # a mask, say
        lengths = [_lengths(branch[self._batch.prompt]) for branch in branches]
        padded = [{-(-length // self._batch.pads_to) * self._batch.pads_to for length in each} for each in lengths]
        if len(set().union(*padded)) > 1:
            said = f"the prompts have {' and '.join(_listed(each) for each in lengths)} tokens"
            return said + (f", padded to {' and '.join(map(_listed, padded))}" if self._batch.pads_to > 1 else "")
        return ""


class _Repeat:
    """A hook for one forward, before all others: repeats the inputs that all branches have in common."""

    def __init__(self, model: nn.Module, batch: GuidanceBatch, times: int) -> None:
        self._batch, self._times = batch, times
        self._hook = model.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self._hook.remove()  # at once: the forward may fail
        shared = next((kwargs[name] for name in self._batch.per_sample if name in kwargs), ())
        if not args and len(kwargs[self._batch.prompt]) != self._times * len(shared):
            return None  # another forward: what was to come after `prepare_models` failed before it
        unknown = [name for name, value in kwargs.items() if not self._is_known(name, value)]
        if args or unknown:
            what = ", ".join(unknown) or "inputs by position"
            raise ValueError(
                f"{type(model).__name__} is given {what}, and its family's GuidanceBatch does not say whether there is "
                "one for each sample; name it there, or give each branch its own forward"
            )
        repeated = {name: self._repeated(kwargs[name]) for name in self._batch.per_sample if name in kwargs}
        return args, kwargs | repeated

    def _is_known(self, name: str, value: Any) -> bool:
        return name in (self._batch.prompt, *self._batch.per_sample) or isinstance(value, bool | None)

    def _repeated(self, value: Any) -> Any:
        return value * self._times if isinstance(value, list) else torch.cat([value] * self._times)


def _lengths(prompt: Any) -> set[int]:
    """The lengths of a branch's prompts, in tokens."""
    return {len(each) for each in prompt} if isinstance(prompt, list) else {prompt.shape[1]}


def _listed(numbers: set[int]) -> str:
    return "/".join(map(str, sorted(numbers)))
