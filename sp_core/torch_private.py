"""Every private name of torch that sp_core relies on, used here and nowhere else.

Public torch has no log-sum-exp of attention outside `flex_attention`, no matrix product with GELU, no copy of many
tensors at once, and no way to notice a write into a tensor or a hook on a module.
`tests/sp_core/test_private_names.py` fails when a release moves one of these, or when another file of sp_core uses one.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_cuda = torch.ops.aten._scaled_dot_product_flash_attention
cudnn_cuda = torch.ops.aten._scaled_dot_product_cudnn_attention
efficient_cuda = torch.ops.aten._scaled_dot_product_efficient_attention
"""Attention with its log-sum-exp, heads first: `(B, H, S, D)`."""

gelu_of_product = torch._addmm_activation
"""GELU of `bias + rows @ columns`, of shapes `(out,)`, `(N, in)`, `(in, out)`: the tanh approximation on CUDA, the
exact function on CPU."""

copy_each = torch._foreach_copy_
"""Copies a list of tensors into a list of others, in one kernel on CUDA."""


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether the module has hooks that take part in its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def hooks(module: torch.nn.Module) -> list[Callable[..., Any]]:
    """The module's hooks: those that see its inputs, then those that see its outputs."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def without_hooks(module: torch.nn.Module) -> torch.nn.Module:
    """A module of the same parts without its hooks, not compiled. The hooks of its submodules stay."""
    bare = copy.copy(module)
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(bare, kind, OrderedDict())
    return bare


def version(tensor: torch.Tensor) -> int | None:
    """A number that changes when the tensor is written in place; None for inference tensors."""
    return None if tensor.is_inference() else tensor._version
