"""The sequence-parallel plan: where a model's tensors are split and gathered, as data beside the model.

A plan maps module names to what happens at their boundary:

    _sp_plan = {
        "rope": {0: SequenceParallelInput(split_dim=1, split_output=True)},           # shard an output
        "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1)},            # shard a forward parameter
        "proj_out": SequenceParallelOutput(gather_dim=1),                             # gather the output
    }

Names: `""` is the model itself, a dotted path names a submodule (`"outputs.main"` reaches into a ModuleDict,
`"blocks.-1"` is the last block), and one `*` stands for every entry of a ModuleList. Floating tensors `(B, S, D)` are
token streams, all others only go along with them; where attention joins several streams, the plan names them in the
order in which it does.

Written on model classes and in `sp_core.models`; validated here; put to work by `sp_core.hooks`. diffusers' `_cp_plan`
says the same in other words; `plan_from_diffusers` reads it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class SequenceParallelInput:
    """Split a tensor over the sequence ranks.

    Attributes:
        split_dim: the tensor dimension to split, usually 1 of `(B, S, D)`.
        expected_dims: the rank that the tensor must have; another one is an error. None: any.
        split_output: False: a forward parameter, named by the entry's str key, is split before the module runs.
            True: the module's output at the entry's int key is split after it ran.
        auto_pad: pad to equal shares instead of splitting raggedly.
    """

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False
    auto_pad: bool = False


@dataclass(frozen=True)
class OptionalSequenceParallelInput(SequenceParallelInput):
    """As `SequenceParallelInput`, but a tensor of another rank than `expected_dims` is left whole.

    For parameters that are one thing or another: Wan's timestep is one number per sample, or one per token.
    """


@dataclass(frozen=True)
class SequenceParallelOutput:
    """Gather a module's output from the sequence ranks.

    Attributes:
        gather_dim: the tensor dimension along which the shards are joined.
        expected_dims: the rank that the tensor must have; another one is an error. None: any.
    """

    gather_dim: int
    expected_dims: int | None = None


InputSpec = dict[str | int, SequenceParallelInput]
OutputSpec = SequenceParallelOutput | list[SequenceParallelOutput | None]
SequenceParallelModelPlan = dict[str, InputSpec | OutputSpec]


def validate_sp_plan(plan: object) -> SequenceParallelModelPlan:
    """Check the shape of a plan, without a model.

    Returns:
        The plan, typed.

    Raises:
        ValueError: says which entry is wrong and what is allowed there.
    """
    if not isinstance(plan, dict):
        raise ValueError(f"_sp_plan must be a dict from module names to entries, got {type(plan).__name__}")
    for name, entry in plan.items():
        if not isinstance(name, str):
            raise ValueError(f"_sp_plan keys must be strings (module names), got {name!r}")
        if isinstance(entry, dict):
            _validate_inputs(name, entry)
        elif not _is_output_spec(entry):
            raise ValueError(
                f"_sp_plan values must be dict (input spec) or SequenceParallelOutput (or a list of it and None); "
                f"{name!r} has {type(entry).__name__}"
            )
    return plan


def _validate_inputs(name: str, entry: Mapping[object, object]) -> None:
    for key, value in entry.items():
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise ValueError(f"Input spec keys must be str or int, {name!r} has {key!r}")
        if not isinstance(value, SequenceParallelInput):
            raise ValueError(
                f"Input spec values must be SequenceParallelInput, {name!r}[{key!r}] is {type(value).__name__}"
            )
        if isinstance(key, int) and not value.split_output:
            raise ValueError(
                f"Integer keys (output indices) require split_output=True, {name!r}[{key}] has False; "
                "use the parameter's name to split an input"
            )
        if isinstance(key, str) and value.split_output:
            raise ValueError(
                f"Parameter names split an input, but {name!r}[{key!r}] has split_output=True; "
                "use the output's index to split an output"
            )


def _is_output_spec(entry: object) -> bool:
    if isinstance(entry, list):
        return bool(entry) and all(e is None or isinstance(e, SequenceParallelOutput) for e in entry)
    return isinstance(entry, SequenceParallelOutput)


def get_sp_plan_from_model(model: nn.Module) -> SequenceParallelModelPlan | None:
    """The `_sp_plan` that the model or its class carries, validated; None where it has none.

    Raises:
        ValueError: the plan is malformed.
    """
    plan = getattr(model, "_sp_plan", None)
    return None if plan is None else validate_sp_plan(plan)


def plan_from_diffusers(cp_plan: Mapping[str, Any]) -> SequenceParallelModelPlan:
    """diffusers' `_cp_plan` as a plan. Its inputs are optional ones: diffusers leaves other tensors whole.

    Raises:
        ValueError: an entry that is neither diffusers' `ContextParallelInput` nor its `ContextParallelOutput`.
    """
    plan: SequenceParallelModelPlan = {}
    for name, entry in cp_plan.items():
        if isinstance(entry, Mapping):
            plan[name] = {key: _input_from_diffusers(name, value) for key, value in entry.items()}
        elif isinstance(entry, list | tuple):
            plan[name] = [None if value is None else _output_from_diffusers(name, value) for value in entry]
        else:
            plan[name] = _output_from_diffusers(name, entry)
    return validate_sp_plan(plan)


def _input_from_diffusers(name: str, entry: Any) -> SequenceParallelInput:
    if not hasattr(entry, "split_dim"):
        raise ValueError(f"_cp_plan[{name!r}] has a {type(entry).__name__}, expected ContextParallelInput")
    return OptionalSequenceParallelInput(entry.split_dim, entry.expected_dims, entry.split_output)


def _output_from_diffusers(name: str, entry: Any) -> SequenceParallelOutput:
    if not hasattr(entry, "gather_dim"):
        raise ValueError(f"_cp_plan[{name!r}] has a {type(entry).__name__}, expected ContextParallelOutput")
    return SequenceParallelOutput(entry.gather_dim, entry.expected_dims)


def resolve_modules(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that a plan key names, in order.

    Raises:
        ValueError: no such submodule, more than one `*`, or `*` on something that is not a ModuleList.
    """
    if name.count("*") > 1:
        raise ValueError(f"Wildcard '*' can only be used once in a plan key, got {name!r}")
    found = [model]
    for atom in name.split(".") if name else []:
        if atom == "*":
            parent = found[0]
            if not isinstance(parent, nn.ModuleList):
                raise ValueError(
                    f"Wildcard '*' can only be used with ModuleList, but in {name!r} it is applied to a "
                    f"{type(parent).__name__}"
                )
            found = list(parent)
        else:
            found = [_child(model, module, atom, name) for module in found]
    return found


def _child(model: nn.Module, module: nn.Module, atom: str, name: str) -> nn.Module:
    if isinstance(module, nn.ModuleList) and re.fullmatch(r"-[0-9]+", atom):
        atom = str(len(module) + int(atom))  # "blocks.-1" is the last block
    child = module._modules.get(atom)
    if child is None:
        here = ", ".join(module._modules) or "nothing"
        raise ValueError(
            f"{atom!r} (of the plan key {name!r}) is not a submodule of {type(module).__name__} in "
            f"{type(model).__name__}; it has: {here}"
        )
    return child
