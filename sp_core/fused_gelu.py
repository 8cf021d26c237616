"""Lets a matrix product compute the GELU that follows it, on CUDA in half precision, if the function is the same.

A feed-forward layer widens its tokens, applies GELU and narrows them again. As two operators the wide tensor is
written, read and written once more. cuBLAS applies the tanh approximation of GELU to the sums in fp32, before they are
written. It is not used on CPU, where torch's operator computes the exact GELU instead; in fp32, because the
approximation inside the product need not be that exact; while torch.compile traces, which fuses by itself; or if the
layer is more than its weight and bias: with active adapters, hooks, or a sum over ranks.

Declared as `FusedGelu` in a family's file, called by `sp_core.replacements`.
"""

import functools
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from sp_core import torch_private
from sp_core.cuda_kernels import HALF
from sp_core.models.family import FusedGelu
from sp_core.tensor_parallel import ColumnParallelLinear


def replace(model: nn.Module, fused: FusedGelu) -> Callable[[], None] | None:
    """Make each of these layers of a model one operator, if possible.

    Args:
        model: its weights may come later.
        fused: which layers.

    Returns:
        The function that undoes it; None if the layers are not as declared, and nothing is changed.
    """
    layers = [m for n, m in model.named_modules() if any(fnmatch(n, pattern) for pattern in fused.layers)]
    if not layers or not all(_is_expected(layer) for layer in layers):
        return None
    kinds: list[type] = [type(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = _fusing(kind)

    def undo() -> None:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind

    return undo


def fits(projection: nn.Module, tokens: torch.Tensor) -> bool:
    """Whether the fused product gives the same as the layer followed by GELU, within the rounding of its type.

    Args:
        projection: the layer before GELU.
        tokens: its input, `(..., in)`.
    """
    return (
        _has_tanh(tokens)
        and tokens.ndim > 1
        and type(projection) in (nn.Linear, ColumnParallelLinear)
        and projection.weight.dtype is tokens.dtype
        and projection.bias is not None
        and not torch_private.has_hooks(projection)
        and not torch.is_grad_enabled()
    )


def product(projection: Any, tokens: torch.Tensor) -> torch.Tensor:
    """GELU of the layer's output, `(..., in)` to `(..., out)`."""
    rows = tokens.flatten(0, -2)
    widened = torch_private.gelu_of_product(projection.bias, rows, projection.weight.t(), use_gelu=True)
    return widened.view(*tokens.shape[:-1], widened.shape[-1])


def _has_tanh(tokens: torch.Tensor) -> bool:
    """Whether the fused GELU is the tanh approximation, and as exact as the type of its result."""
    return tokens.is_cuda and tokens.dtype in HALF


def _is_expected(layer: Any) -> bool:
    kind = type(layer)
    return kind.__name__ == "GELU" and kind.__module__.startswith("diffusers.") and layer.approximate == "tanh"


@functools.cache
def _fusing(kind: type) -> type:
    """A subclass of `kind` that is one operator if possible, and otherwise computes as `kind` does."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not fits(self.proj, hidden_states):
            return kind.forward(self, hidden_states)  # type: ignore[attr-defined, no-any-return]
        return product(self.proj, hidden_states)

    return type(f"Fusing{kind.__name__}", (kind,), {"forward": forward})
