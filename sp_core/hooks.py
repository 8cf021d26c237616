"""The plan at work: torch hooks that split and gather tensors at module boundaries.

`apply_sequence_parallel(model, plan, mesh)` installs them and returns a handle that takes them off again. Called by
`sp_core.parallelize`. Only hooks: the attention between split and gather is bound by the recipe, not here.

    input -> [SequenceParallelSplitHook, before the module] -> module -> [split of its outputs, or gather] -> output
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sp_core.mesh import ParallelMesh
from sp_core.sp_plan import (
    InputSpec,
    OptionalSequenceParallelInput,
    OutputSpec,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
    resolve_modules,
    validate_sp_plan,
)
from sp_core.sp_sharding import SequenceShards


class Handle:
    """Undoes what was applied to a model, last thing first. `remove()` may be called more than once."""

    def __init__(self, undo: list[Callable[[], None]]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Give the plain model back."""
        while self._undo:
            self._undo.pop()()


class SequenceParallelSplitHook:
    """Splits the named forward parameters, and the numbered outputs, of one module.

    Args:
        name: the module's plan key, for messages.
        module: the module; its forward's signature tells where a positional parameter stands.
        spec: str keys are parameters, int keys are outputs.
        shards: the model's record of what is split.

    Raises:
        ValueError: a key names no parameter of the module's forward.
    """

    def __init__(self, name: str, module: nn.Module, spec: InputSpec, shards: SequenceShards) -> None:
        self.name = name
        self.shards = shards
        self.outputs = {key: entry for key, entry in spec.items() if isinstance(key, int)}
        self.inputs = {key: entry for key, entry in spec.items() if isinstance(key, str)}
        parameters = list(inspect.signature(module.forward).parameters)
        for key in self.inputs:
            if key not in parameters:
                raise ValueError(
                    f"Parameter {key!r} not found in function signature of {name!r} "
                    f"({type(module).__name__}.forward); it has: {', '.join(parameters)}"
                )
        self.positions = {key: parameters.index(key) for key in self.inputs}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: `(args, kwargs)` with this rank's shares in the parameters' places."""
        positional = list(args)
        for key, entry in self.inputs.items():
            if key in kwargs:
                kwargs[key] = self._split(key, kwargs[key], entry)
            elif self.positions[key] < len(positional):
                positional[self.positions[key]] = self._split(key, positional[self.positions[key]], entry)
        return tuple(positional), kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: the output with this rank's shares in the numbered places."""
        whole = output if isinstance(output, tuple | list) else (output,)
        split = list(whole)
        for key, entry in self.outputs.items():
            if key >= len(split):
                raise ValueError(f"Index {key} out of bounds for output of {self.name!r}, which has {len(split)}")
            split[key] = self._split(f"output {key}", split[key], entry)
        return _like(output, split) if whole is output else split[0]

    def _split(self, key: str, value: Any, entry: SequenceParallelInput) -> Any:
        if value is None:  # an optional tensor that this call does without
            return None
        where = f"{key} of {self.name!r}"
        if isinstance(entry, OptionalSequenceParallelInput) and getattr(value, "ndim", None) != entry.expected_dims:
            return value
        _check_tensor(where, value, entry.expected_dims)
        is_stream = value.ndim == 3 and value.is_floating_point()  # (B, S, D); masks and rotations only go along
        name = f"{self.name}.{key}" if is_stream else None
        return self.shards.shard(value, entry.split_dim, stream=name, padded=entry.auto_pad)


class SequenceParallelGatherHook:
    """Gathers the outputs of one module; `None` in the spec leaves that output as it is.

    Args:
        name: the module's plan key, for messages.
        spec: one entry for a single output, or a list with one entry per output.
        shards: the model's record of what is split.
    """

    def __init__(self, name: str, spec: OutputSpec, shards: SequenceShards) -> None:
        self.name = name
        self.single = isinstance(spec, SequenceParallelOutput)
        self.spec = [spec] if isinstance(spec, SequenceParallelOutput) else spec
        self.shards = shards

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: the output, whole again."""
        parts = (output,) if self.single and isinstance(output, torch.Tensor) else output
        if not isinstance(parts, tuple | list) or len(parts) != len(self.spec):
            got = f"{len(parts)} outputs" if isinstance(parts, tuple | list) else type(output).__name__
            raise ValueError(f"Expected {len(self.spec)} outputs, got {got} from {self.name!r}")
        whole = [self._gather(part, entry) for part, entry in zip(parts, self.spec, strict=True)]
        self.shards.close_region()
        return whole[0] if parts is not output else _like(output, whole)

    def _gather(self, value: Any, entry: SequenceParallelOutput | None) -> Any:
        if entry is None:
            return value
        _check_tensor(f"output of {self.name!r}", value, entry.expected_dims)
        return self.shards.gather(value, entry.gather_dim)


def apply_sequence_parallel(
    model: nn.Module, plan: SequenceParallelModelPlan, mesh: ParallelMesh
) -> tuple[SequenceShards, Handle]:
    """Install the hooks of a plan.

    Args:
        model: whose submodules the plan names.
        plan: see `sp_core.sp_plan`.
        mesh: the sequence ranks.

    Returns:
        The model's record of what is split, for the attention that runs between split and gather; and the handle
        that removes the hooks.

    Raises:
        ValueError: the plan is malformed, or names what the model does not have. No hook is left behind.
    """
    shards = SequenceShards(mesh)
    installed: list[RemovableHandle] = []
    try:
        installed.append(model.register_forward_pre_hook(lambda *_: shards.begin()))
        for name, entry in validate_sp_plan(plan).items():
            for module in resolve_modules(model, name):
                installed += _hook(name, module, entry, shards)
        installed.append(model.register_forward_hook(lambda *_: shards.end(), always_call=True))
    except Exception:
        for hook in installed:
            hook.remove()
        raise
    return shards, Handle([hook.remove for hook in installed])


def _hook(
    name: str, module: nn.Module, entry: Mapping[str | int, SequenceParallelInput] | OutputSpec, shards: SequenceShards
) -> list[RemovableHandle]:
    if not isinstance(entry, Mapping):
        return [module.register_forward_hook(SequenceParallelGatherHook(name, entry, shards).after)]
    split = SequenceParallelSplitHook(name, module, dict(entry), shards)
    hooks = []
    if split.inputs:
        hooks.append(module.register_forward_pre_hook(split.before, with_kwargs=True))
    if split.outputs:
        hooks.append(module.register_forward_hook(split.after))
    return hooks


def _like(output: Any, parts: list[Any]) -> Any:
    """The parts as the kind of tuple or list that the module returned."""
    return output._make(parts) if hasattr(output, "_make") else type(output)(parts)


def _check_tensor(where: str, value: Any, expected_dims: int | None) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"Unsupported input type for sharding: {where} is {type(value).__name__}, expected a tensor")
    if expected_dims is not None and value.ndim != expected_dims:
        raise ValueError(
            f"{where} has {value.ndim} dimensions (shape {tuple(value.shape)}), but the plan says "
            f"expected_dims={expected_dims}"
        )
