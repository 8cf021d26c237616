"""Makes a model run on all ranks of a mesh, in order: check, weights, hooks of the plan, replacements, attention.

    mesh = ParallelMesh.create(ParallelDegrees(ulysses_degree=2), device_type="cpu", timeout_s=60)
    handle = parallelize(model, mesh)
    ...
    handle.remove()

Called by `workers.model.weights` when a rank loads its model. Anyone else may call it: it needs neither Ray nor a file.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from sp_core import diffusers_private
from sp_core.attention.diffusers_backend import bind_attention
from sp_core.attention.discovery import find_attention
from sp_core.cuda_kernels import in_use
from sp_core.degrees import check_layout, layout_advice, num_heads
from sp_core.handle import Handle
from sp_core.hooks import context_of_plan, install_hooks
from sp_core.kernel_choice import settle_kernel
from sp_core.mesh import ParallelMesh
from sp_core.models.family import ModelFamily
from sp_core.models.lookup import families, find_family
from sp_core.replacements import apply_replacements
from sp_core.sp_plan import (
    SequenceParallelModelPlan,
    SequenceParallelOutput,
    get_sp_plan_from_model,
    plan_from_diffusers,
)
from sp_core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, apply_tensor_parallel
from sp_core.tp_plan import TensorParallelPlan, tp_plan_from_diffusers

_parallelized: WeakSet[nn.Module] = WeakSet()

_logger = logging.getLogger(__name__)


def parallelize(
    model: nn.Module,
    mesh: ParallelMesh,
    plan: SequenceParallelModelPlan | None = None,
    *,
    family: ModelFamily | None = None,
    dtype: torch.dtype | None = None,
    kernel: str | None = None,
) -> Handle:
    """Make `model` compute the same answer on all ranks of `mesh`, each holding a share of the sequence. For inference:
    collectives pass no gradients.

    Every rank must call it, on models with equal weights. The model's code does not change, nor do its weights, unless
    the layout is tensor parallel: then each rank keeps only its part of them.

    Args:
        model: a diffusers transformer.
        mesh: the ranks.
        plan: where to split and gather; None takes the class's own `_sp_plan`, else that of its family, else reads
            diffusers' `_cp_plan`.
        family: the family whose plans and peculiarities it has; None: that of its class in `sp_core.models`, if any.
        dtype: in which the model will compute; None: that of its weights. They may be loaded later.
        kernel: of attention without a mask on CUDA, by its name in `sp_core.cuda_kernels`; None: the fastest on rank 0.

    Returns:
        The handle whose `remove()` gives the plain model back; for a tensor-parallel model it raises and does nothing.

    Raises:
        ValueError: the layout, the plan or the kernel does not fit the model, the model has no plan, or it is parallel
            already.
        RuntimeError: the kernel does not work here, or none does.
    """
    if model in _parallelized:
        raise ValueError(f"{type(model).__name__} is parallelized already; remove() that first")
    if any(isinstance(module, ColumnParallelLinear | RowParallelLinear) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} holds only a part of its weights already; load it again")
    config = _config(model)
    check_layout(mesh.degrees, num_heads(config))
    if family is not None and plan is None:
        plan = family.sequence_plan(config)
    family = family or find_family(_class_names(model))
    irreversible = ""
    if mesh.degrees.tensor_parallel_size > 1:
        apply_tensor_parallel(model, _find_tp_plan(model, family), mesh.axis("tp"))
        irreversible = "a tensor-parallel model holds only a part of its weights; load it again to have it whole"
    given = plan if plan is not None else getattr(model, "_sp_plan", None)
    replacing = family if given is None else None  # a family's file knows what is where in its own plan only
    if not mesh.shares_sequence and given != {}:
        forget_kernel = settle_kernel(model, mesh, dtype or _dtype(model), _head_size(config), kernel)
        _report(model, mesh, config)
        restore = apply_replacements(model, replacing, config, mesh)
        return Handle([forget_kernel, *restore], irreversible=irreversible)
    found, order_known = (plan, True) if plan is not None else _find_plan(model, family)
    if found and not any(isinstance(entry, SequenceParallelOutput | list | tuple) for entry in found.values()):
        raise ValueError(
            f"the plan of {type(model).__name__} splits but gathers nothing: each rank would return a share"
        )
    with ExitStack() as on_failure:
        undo = [settle_kernel(model, mesh, dtype or _dtype(model), _head_size(config), kernel)]
        on_failure.callback(Handle(undo).remove)
        _report(model, mesh, config)
        attention = find_attention(model, family, optional=found == {})
        context = context_of_plan(found, mesh, order_known=order_known, local_attention=attention.local_attention)
        undo.append(install_hooks(model, found, context).remove)
        undo += apply_replacements(model, replacing, config, mesh)
        undo.append(bind_attention(model, attention, context))
        on_failure.pop_all()
    _parallelized.add(model)
    return Handle([*undo, lambda: _parallelized.discard(model)], context, irreversible)


def _class_names(model: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(model).__mro__]


def _config(model: nn.Module) -> Mapping[str, Any]:
    """The model's config, empty where it has none."""
    config = getattr(model, "config", None)
    return config if isinstance(config, Mapping) else {}


def _dtype(model: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in model.parameters()), torch.float32)


def _head_size(config: Mapping[str, Any]) -> int | None:
    """The size of the attention heads, by the names that configs have for it; None if they do not say."""
    if (size := config.get("attention_head_dim")) is not None:
        return int(size)
    heads = num_heads(config) or config.get("num_heads")
    width = next((config[name] for name in ("dim", "hidden_size") if name in config), None)
    if heads and width:
        return int(width // heads)
    return sum(config["axes_dims"]) if "axes_dims" in config else None  # each head has the rotations of all axes


def _report(model: nn.Module, mesh: ParallelMesh, config: Mapping[str, Any]) -> None:
    """Log how the model will run: the kernel, and what an uneven layout costs."""
    kernel = in_use(mesh.device)
    _logger.info("%s on %s: attention by %s", type(model).__name__, mesh.degrees, kernel)
    advice = layout_advice(mesh.degrees, num_heads(config))
    if advice:
        _logger.info("%s", advice)


def _find_plan(model: nn.Module, family: ModelFamily | None) -> tuple[SequenceParallelModelPlan, bool]:
    """The model's plan, and whether it names the streams in the order in which attention joins them."""
    own = get_sp_plan_from_model(model)
    if own is not None:
        return own, True
    if family is not None and family.refused:
        raise ValueError(f"{type(model).__name__} is not supported yet: {family.refused}; pass plan=")
    if family is not None:
        if reason := family.refuses(_config(model)):
            raise ValueError(f"{type(model).__name__} is not supported with this config: {reason}; pass plan=")
        return family.sequence_plan(_config(model)), True
    shipped = diffusers_private.context_parallel_plan(model)
    if shipped:
        return plan_from_diffusers(shipped), False
    known = ", ".join(name for family in families() if not family.refused for name in family.transformer_classes)
    raise ValueError(
        f"{type(model).__name__} has no sequence-parallel plan: give it a class attribute _sp_plan, or pass plan=. "
        f"Known: {known}"
    )


def _find_tp_plan(model: nn.Module, family: ModelFamily | None) -> TensorParallelPlan:
    if family is not None and family.tp_plan:
        return family.tensor_plan(_config(model))
    shipped = diffusers_private.tensor_parallel_plan(model)
    if shipped:
        return tp_plan_from_diffusers(shipped)
    raise ValueError(
        f"{type(model).__name__} has no tensor-parallel plan; use tensor_parallel_size=1 and more Ulysses or ring ranks"
    )
