"""Resolves what a deployment names as `package.module:NAME`: a transformer's class that is not in diffusers, its plan.

A `ModelSpec` comes in, objects go out. Called by `workers.model.loader` before it loads anything, and by
`service.rollout.preflight`. The module must be importable where the ranks run: installed there, or on a PYTHONPATH that
the model's `env` sets.
"""

import importlib
from typing import Any

import torch
from diffusers import ModelMixin

from deploy.model_spec import ModelSpec
from sp_core.sp_plan import SequenceParallelModelPlan, validate_sp_plan


def transformer_class(model: ModelSpec) -> type[torch.nn.Module] | None:
    """The class that the deployment names; None if it names none, and the model's config decides.

    Raises:
        ValueError: it cannot be imported, or is not a diffusers model.
    """
    if model.transformer_class is None:
        return None
    found = _resolve("transformer_class", model.transformer_class)
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        what = found.__name__ if isinstance(found, type) else f"a {type(found).__name__}"
        raise ValueError(
            f"transformer_class {model.transformer_class} must be a subclass of diffusers.ModelMixin, got {what}"
        )
    kind: type[torch.nn.Module] = found
    return kind


def sequence_plan(model: ModelSpec) -> SequenceParallelModelPlan | None:
    """The plan that the deployment names; None if it names none, and `sp_core.parallelize` finds the model's own.

    Raises:
        ValueError: it cannot be imported, or is not a plan.
    """
    if model.plan is None:
        return None
    found = _resolve("plan", model.plan)
    try:
        return validate_sp_plan(found)
    except ValueError as error:
        raise ValueError(f"plan {model.plan} cannot be used: {error}") from None


def _resolve(key: str, symbol: str) -> Any:
    """Import what `symbol` names. Errors name the deployment's `key`, and hint only if the module itself is missing."""
    module_name, name = symbol.split(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # its own code runs, and may raise anything
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        hint = "; install it where the ranks run, or set env.PYTHONPATH to its folder" if absent else ""
        raise ValueError(f"{key} {symbol} cannot be imported: {type(error).__name__}: {error}{hint}") from (
            None if absent else error
        )
    if not hasattr(module, name):
        raise ValueError(f"{key} {symbol}: {module_name} ({module.__file__}) has no {name}")
    return getattr(module, name)
