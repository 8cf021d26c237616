"""Rotary positions in real arithmetic, because torch.compile has no good code for complex products.

Inductor generates no code for complex numbers: each product in a compiled block leaves the generated kernels, with
copies before and after it. Here the source of the rotations returns pairs of real numbers, `(..., D / 2, 2)` for
complex `(..., D / 2)`, as a view. In a compiled block the processor's own call gets no rotations; the norms of queries
and keys, right after which it would rotate, do so instead. In eager mode, where one complex product is faster than real
ones, the call gets the pairs as complex numbers again and computes the same as before, bit for bit.

Declared as `RealRotation` in a family's file, called by `sp_core.replacements`. Splitting the rotations along the
sequence works on pairs as on complex numbers.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sp_core.models.family import RealRotation


def replace(model: nn.Module, rotation: RealRotation) -> Callable[[], None] | None:
    """Make this model rotate by pairs in compiled blocks.

    Args:
        model: the hooks that split the output of `source` are installed already; its attention is not bound yet.
        rotation: where its rotations are made and used.

    Returns:
        The function that undoes it; None if something else would get the pairs, and nothing is changed.
    """
    attending = [module for module in model.modules() if hasattr(module, "processor")]
    kinds = [type(module.processor) for module in attending]
    expected = all(kind.__name__ == rotation.processor and kind.__module__.startswith("diffusers.") for kind in kinds)
    source: Any = getattr(model, rotation.source, None)
    if not attending or not expected or not callable(source):
        return None
    originals: list[Any] = [module.processor for module in attending]
    for module, original in zip(attending, originals, strict=True):
        module.processor = _instead(original, _rotating(original.__class__, rotation))
    if isinstance(source, nn.Module):
        release = source.register_forward_hook(lambda _module, _args, output: _each(as_pairs, output)).remove
    else:
        setattr(model, rotation.source, _instead(source, _in_pairs(source.__class__)))
        release = functools.partial(setattr, model, rotation.source, source)

    def undo() -> None:
        release()
        for module, original in zip(attending, originals, strict=True):
            module.processor = original

    return undo


def as_pairs(rotations: torch.Tensor) -> torch.Tensor:
    """Complex `(...)` seen as real `(..., 2)`; anything else as it is."""
    return torch.view_as_real(rotations) if rotations.is_complex() else rotations


def rotate(x: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """`(..., D)` as `D / 2` complex numbers times the same number of rotations, `(..., D / 2, 2)`; in fp32, as `x`."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = pairs.unbind(-1)
    rotated = torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1)
    return rotated.flatten(-2).type_as(x)


class RotatingNorms:
    """An attention module whose norms of queries and keys, `(B, S, H, D)`, rotate what they return.

    Args:
        attention: the module; all else is its own.
        pairs: by the name of a norm, `(S, D / 2, 2)` or `(B, S, D / 2, 2)`.
    """

    def __init__(self, attention: nn.Module, pairs: Mapping[str, torch.Tensor]) -> None:
        self._attention = attention
        self._pairs = pairs

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._attention, name)
        if name not in self._pairs:
            return own
        pairs = self._pairs[name].unsqueeze(-3)  # for all heads
        return lambda x: rotate(x if own is None else own(x), pairs)


@functools.cache
def _rotating(kind: type, rotation: RealRotation) -> type:
    """A subclass of a class of processors that takes pairs too.

    diffusers reads the signature of a processor and drops the arguments that are not in it, hence the wrapping.
    """

    @functools.wraps(kind.__call__)
    def call(self: Any, attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get(rotation.parameter)
        rotations = given if isinstance(given, tuple) else (given,)
        if given is None or rotations[0].is_complex():
            return kind.__call__(self, attention, *args, **kwargs)
        if not torch.compiler.is_compiling():
            return kind.__call__(
                self, attention, *args, **kwargs | {rotation.parameter: _each(torch.view_as_complex, given)}
            )
        pairs = {norm: rotations[which] for norm, which in rotation.norms}
        return kind.__call__(self, RotatingNorms(attention, pairs), *args, **kwargs | {rotation.parameter: None})

    return type(f"Real{kind.__name__}", (kind,), {"__call__": call})


@functools.cache
def _in_pairs(kind: type) -> type:
    """A subclass of a class of callables that returns pairs instead of complex numbers."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _each(as_pairs, kind.__call__(self, *args, **kwargs))

    return type(f"Real{kind.__name__}", (kind,), {"__call__": call})


def _instead(original: Any, kind: type) -> Any:
    """A copy of an object, of another class. A copy, because modules may share one."""
    copied = copy.copy(original)
    copied.__class__ = kind
    return copied


def _each(function: Callable[[torch.Tensor], torch.Tensor], rotations: Any) -> Any:
    """Apply a function to one tensor, or to each of several."""
    if isinstance(rotations, tuple):
        return tuple(function(each) for each in rotations)
    return function(rotations)
