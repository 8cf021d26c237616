"""Applies a plan: torch hooks that split and gather tensors at module boundaries.

`apply_sequence_parallel(model, plan, mesh)` installs them and returns a handle that removes them again;
`sp_core.parallelize` calls its two halves. Only hooks: the attention between split and gather is bound elsewhere.

Each forward of a module in the plan passes here, on the host only: a split is a view, and nothing else is copied that
torch does not copy itself. Inside a compiled block hooks see `is_compiling`, and the operators of `sp_core.sp_sharding`
take over.

    input -> [SequenceParallelSplitHook, before the module] -> module -> [split of its outputs, or gather] -> output
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sp_core import grid_convolution, kernels
from sp_core.handle import Handle
from sp_core.mesh import ParallelMesh
from sp_core.module_paths import resolve_modules
from sp_core.region import SequenceContext
from sp_core.sp_plan import (
    AnyInput,
    InputSpec,
    OptionalSequenceParallelInput,
    OutputSpec,
    SequenceParallelCompanion,
    SequenceParallelConvolution,
    SequenceParallelGrid,
    SequenceParallelLeadingCount,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    validate_sp_plan,
)
from sp_core.sp_sharding import gather, leading, on_line, shard, tokens_of_region


class SequenceParallelSplitHook:
    """Splits the named forward parameters, and the numbered outputs, of one module.

    Args:
        name: the module's plan key, for messages.
        module: the module; the signature of its forward gives the positions of its parameters.
        spec: str keys are parameters, int keys are outputs.
        context: the context of the model.

    Raises:
        ValueError: a key names no parameter of the module's forward.
    """

    def __init__(self, name: str, module: nn.Module, spec: InputSpec, context: SequenceContext) -> None:
        self.name = name
        self.context = context
        self.outputs = {key: entry for key, entry in spec.items() if isinstance(key, int)}
        self.inputs = {key: entry for key, entry in spec.items() if isinstance(key, str)}
        entries = (each for entry in spec.values() for each in (entry if isinstance(entry, list) else [entry]))
        self.needs_lengths = any(
            isinstance(entry, SequenceParallelLeadingCount) or getattr(entry, "per_sample", False) for entry in entries
        )
        self.grid = [key for key, entry in self.inputs.items() if isinstance(entry, SequenceParallelGrid)]
        self.positions = {p: i for i, p in enumerate(inspect.signature(module.forward).parameters)}
        for key in [*self.inputs, *_text_sources(spec)]:
            if key not in self.positions:
                raise ValueError(
                    f"Parameter {key!r} not found in function signature of {name!r} "
                    f"({type(module).__name__}.forward); it has: {', '.join(self.positions)}"
                )

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: `(args, kwargs)` with this rank's shares in place of the whole parameters.

        They stay positional or named, as the caller passed them; a parameter that was left out stays out.
        """
        positional, named = list(args), dict(kwargs)
        for key, entry in self.inputs.items():
            if key in kwargs:
                named[key] = self._split(key, kwargs[key], entry, args, kwargs)
            elif self.positions[key] < len(args):
                position = self.positions[key]
                positional[position] = self._split(key, args[position], entry, args, kwargs)
        return tuple(positional), named

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: the output with this rank's shares in place of the numbered ones."""
        split = _parts(self.name, output)
        for key, entry in self.outputs.items():
            if key >= len(split):
                raise ValueError(f"Index {key} out of bounds for output of {self.name!r}, which has {len(split)}")
            split[key] = self._split(str(key), split[key], entry, args, kwargs)
        return _like(output, split)

    def _split(self, key: str, value: Any, entry: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Split one parameter or output: a tensor, several in a list or by key, or None if this call passes none."""
        where = f"{'output ' if key.isdecimal() else ''}{key} of {self.name!r}"
        if value is None:
            return None
        if isinstance(entry, SequenceParallelLeadingCount | SequenceParallelGrid):
            if not isinstance(value, int):
                raise ValueError(f"{where} is {type(value).__name__}, but the plan says that it counts tokens")
            if isinstance(entry, SequenceParallelGrid):
                return on_line(self.context, key, value, last=key == self.grid[-1])
            return leading(self.context, value, entry.stream)
        if isinstance(value, torch.Tensor):
            if isinstance(entry, list | tuple):
                raise ValueError(f"Expected SequenceParallelInput for tensor parameter {where}, the plan has a list")
            return self._share(key, where, value, entry, args, kwargs)
        if isinstance(value, Mapping) and isinstance(entry, SequenceParallelCompanion):  # by the number of a layer
            return {n: self._share(f"{key}.{n}", where, item, entry, args, kwargs) for n, item in value.items()}
        if not isinstance(value, list | tuple):
            raise ValueError(
                f"Unsupported input type for sharding: {where} is {type(value).__name__}, expected a tensor or a list"
            )
        if isinstance(entry, SequenceParallelCompanion):
            entry = [entry] * len(value)
        if not isinstance(entry, list | tuple):
            raise ValueError(
                f"Expected list/tuple of SequenceParallelInput for {where}, which is a list of {len(value)}; the plan "
                f"has {type(entry).__name__} (a single SequenceParallelCompanion splits each tensor of a list)"
            )
        if len(entry) != len(value):
            raise ValueError(f"Expected {len(entry)} elements in {where}, as the plan says; got {len(value)}")
        shares = []
        for i, (item, each) in enumerate(zip(value, entry, strict=True)):
            if item is None or each is None:
                shares.append(item)
            elif isinstance(item, list | tuple):  # such as the rotations of one stream among those of several
                shares.append(self._split(f"{key}.{i}", item, each, args, kwargs))
            else:
                shares.append(self._share(f"{key}.{i}", where, item, each, args, kwargs))
        return _like(value, shares)

    def _share(
        self, key: str, where: str, value: Any, entry: AnyInput, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if _stays_whole(value, entry):
            return value  # type: ignore[no-any-return]
        _check_tensor(where, value, entry.expected_dims)
        # (B, S, D): masks and rotations have another shape or type; for what looks alike the plan says companion
        is_stream = value.ndim == 3 and value.is_floating_point() and not isinstance(entry, SequenceParallelCompanion)
        name = f"{self.name}.{key}" if is_stream else None
        if getattr(entry, "per_sample", False):
            dim = entry.split_dim % value.ndim
            samples = value.unflatten(dim, (-1, tokens_of_region(self.context)))
            return shard(self.context, samples, dim + 1, stream=None).flatten(dim, dim + 1)
        if isinstance(entry, SequenceParallelPartialInput):
            text = self._text_length(entry.text_len_source, args, kwargs)
            return shard(self.context, value, entry.split_dim, stream=name, replicated=text)
        return shard(self.context, value, entry.split_dim, stream=name, padded=entry.auto_pad)

    def _text_length(self, source: str | int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        if isinstance(source, int):
            return source
        position = self.positions[source]
        value = kwargs[source] if source in kwargs else args[position] if position < len(args) else None
        if value is None:
            raise ValueError(f"Parameter {source!r} is None, cannot determine text length for {self.name!r}")
        if isinstance(value, torch.Tensor):
            return value.shape[0]
        if isinstance(value, int):
            return value
        raise ValueError(
            f"Failed to resolve text_len_source {source!r} of {self.name!r}: it is {type(value).__name__}, expected a "
            "tensor (its first dimension counts) or a number"
        )


class SequenceParallelGatherHook:
    """Gathers the outputs of one module; `None` in the spec leaves that output as it is.

    Args:
        name: the module's plan key, for messages.
        spec: one entry for a single output, or a list with one entry per output.
        context: the model's.
    """

    def __init__(self, name: str, spec: OutputSpec, context: SequenceContext) -> None:
        self.name = name
        self.spec = [spec] if isinstance(spec, SequenceParallelOutput) else list(spec)
        self.context = context

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: the output, whole again."""
        parts = _parts(self.name, output)
        if len(parts) != len(self.spec):
            raise ValueError(f"Expected {len(self.spec)} outputs, got {len(parts)} from {self.name!r}")
        for i, entry in enumerate(self.spec):
            if entry is not None:
                _check_tensor(f"output {i} of {self.name!r}", parts[i], entry.expected_dims)
                parts[i] = gather(self.context, parts[i], entry.gather_dim, stream=entry.stream)
        return _like(output, parts)


def apply_sequence_parallel(model: nn.Module, plan: SequenceParallelModelPlan, mesh: ParallelMesh) -> Handle:
    """Install the hooks of a plan.

    Args:
        model: whose submodules the plan names.
        plan: see `sp_core.sp_plan`.
        mesh: the sequence ranks.

    Returns:
        The handle that removes the hooks.

    Raises:
        ValueError: the plan is malformed, or names what the model does not have. No hook is left installed.
    """
    return install_hooks(model, plan, context_of_plan(plan, mesh))


def context_of_plan(
    plan: SequenceParallelModelPlan,
    mesh: ParallelMesh,
    *,
    order_known: bool = True,
    local_attention: Callable[..., torch.Tensor] = kernels.local_attention,
) -> SequenceContext:
    """The context of a model that is split by this plan. See there for the arguments.

    Raises:
        ValueError: the plan is malformed.
    """
    validate_sp_plan(plan)
    splits = [
        (name, key, entry) for name, spec in plan.items() if isinstance(spec, dict) for key, entry in spec.items()
    ]
    streams = [
        f"{name}.{key}{part}"
        for name, key, entry in splits
        for part in ([f".{i}" for i in range(len(entry))] if isinstance(entry, list | tuple) else [""])
    ]
    # If one split pads, all do: a companion of a padded stream must be as long as the stream's shares.
    auto_pad = any(getattr(entry, "auto_pad", False) for _, _, entry in splits)
    places = {stream: place for place, stream in enumerate(streams)}
    return SequenceContext(mesh, places, auto_pad, order_known, local_attention)


def install_hooks(model: nn.Module, plan: SequenceParallelModelPlan, context: SequenceContext) -> Handle:
    """See `apply_sequence_parallel`."""
    undo: list[Callable[[], None]] = []
    try:
        undo.append(model.register_forward_pre_hook(lambda *_: context.begin()).remove)
        for name, entry in plan.items():
            for module in resolve_modules(model, name):
                undo += _hook(name, module, entry, context)
        undo.append(model.register_forward_hook(lambda *_: context.end(), always_call=True).remove)
    except Exception:
        for remove in undo:
            remove()
        raise
    return Handle([context.abandon, *undo], context)


def _hook(
    name: str, module: nn.Module, entry: InputSpec | OutputSpec | SequenceParallelConvolution, context: SequenceContext
) -> list[Callable[[], None]]:
    """Install the hooks of one entry; returns the functions that remove them."""
    if isinstance(entry, SequenceParallelConvolution):
        return [grid_convolution.bind(name, module, entry, context)]
    if not isinstance(entry, dict):
        return [module.register_forward_hook(SequenceParallelGatherHook(name, entry, context).after).remove]
    split = SequenceParallelSplitHook(name, module, entry, context)
    hooks = []
    if split.inputs:
        hooks.append(module.register_forward_pre_hook(split.before, with_kwargs=True).remove)
    if split.outputs:
        hooks.append(module.register_forward_hook(split.after, with_kwargs=True).remove)
    return hooks


def _stays_whole(value: Any, entry: AnyInput) -> bool:
    """Whether the entry is optional and does not apply to this tensor."""
    if not isinstance(value, torch.Tensor):
        return False
    if not (isinstance(entry, OptionalSequenceParallelInput) or getattr(entry, "optional", False)):
        return False
    if entry.expected_dims is not None:
        return value.ndim != entry.expected_dims
    return not -value.ndim <= entry.split_dim < value.ndim


def _text_sources(spec: InputSpec) -> list[str]:
    """The forward parameters from which the plan takes the length of a text."""
    entries = [e for entry in spec.values() for e in (entry if isinstance(entry, list | tuple) else [entry])]
    sources = [entry.text_len_source for entry in entries if isinstance(entry, SequenceParallelPartialInput)]
    return [source for source in sources if isinstance(source, str)]


def _parts(name: str, output: Any) -> list[Any]:
    """The outputs of a module: one tensor, a tuple or list (with names or without), or diffusers' ModelOutput."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, tuple | list):
        return list(output)
    raise ValueError(f"Expected tensor or list/tuple of tensors from {name!r}, got {type(output).__name__}")


def _like(output: Any, parts: list[Any]) -> Any:
    """The parts as the kind of output that the module returned."""
    if isinstance(output, torch.Tensor):
        return parts[0]
    if isinstance(output, Mapping):
        return type(output)(**dict(zip(output, parts, strict=True)))
    return output._make(parts) if hasattr(output, "_make") else type(output)(parts)


def _check_tensor(where: str, value: Any, expected_dims: int | None) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"Unsupported input type for sharding: {where} is {type(value).__name__}, expected a tensor")
    if expected_dims is not None and value.ndim != expected_dims:
        raise ValueError(
            f"{where} has {value.ndim} dimensions (shape {tuple(value.shape)}), but the plan says "
            f"expected_dims={expected_dims}"
        )
