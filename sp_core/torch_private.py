"""Every private name of torch that sp_core relies on, used here and nowhere else.

Public torch has no log-sum-exp of attention outside `flex_attention`, no product with GELU in it, no copy of many
tensors at once, and no way to notice a write into a tensor, or a hook on a module.
`tests/sp_core/test_private_names.py` fails when a release moves one of these, or when another file of sp_core reaches
for one.
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
"""GELU of `bias + rows @ columns`, `(out,)`, `(N, in)`, `(in, out)`: its tanh approximation on CUDA, the exact one on
CPU."""

copy_each = torch._foreach_copy_
"""Copies a list of tensors into a list of others, in one kernel on CUDA."""


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody else takes part in the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def hooks(module: torch.nn.Module) -> list[Callable[..., Any]]:
    """Those that see the module's inputs, then those that see its outputs."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def without_hooks(module: torch.nn.Module) -> torch.nn.Module:
    """A module of the same parts, in whose own forward nobody else takes part; it is not compiled.

    What takes part in the forwards of its submodules still does.
    """
    bare = copy.copy(module)
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(bare, kind, OrderedDict())
    return bare


def version(tensor: torch.Tensor) -> int | None:
    """Changes when somebody writes into the tensor in place. Inference tensors have none."""
    return None if tensor.is_inference() else tensor._version
