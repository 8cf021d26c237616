"""Modulation that depends on the timestep only: computed once a step for all layers and all forwards of the step.

A guided step is two forwards at one timestep, and each block of each forward turns the same embedding into its shifts,
scales and gates (adaLN). Those layers see one row a sample, so their time is that of reading their weights; reading
them once instead of twice is what is saved. A single product over the stacked weights of all layers would read as much,
and need all of them twice while they are stacked.

    with same_timestep():      # the caller says that all forwards in it have one timestep
        model(**prompted)
        model(**unprompted)    # its layers return what the first forward has computed

Outside of such a step nothing is shared. The layers' own forward computes the values, so adapters, parallel and
quantized layers inside them do their part. Declared as `SharedModulation` in a family's file, called by
`sp_core.replacements`; `workers.model.denoising` opens the steps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from sp_core.models.family import SharedModulation

_Key = tuple[Any, ...]
_Values = list[torch.Tensor]

_step: ContextVar[dict[_Key, _Values] | None] = ContextVar("step", default=None)


@contextmanager
def same_timestep() -> Iterator[None]:
    """All forwards inside have the same timestep, and the same active adapters: layers may share their modulation.

    A step inside a step is one of its own.
    """
    token = _step.set({})
    try:
        yield
    finally:
        _step.reset(token)


class SharedSequential(nn.Sequential):
    """Returns the value that it was given, if there is one; else computes it of its input.

    Attributes:
        shared: `(B, out)`, during a forward.
    """

    shared: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(B, in)` to `(B, out)`."""
        if self.shared is not None:
            return self.shared
        output: torch.Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return output


class _Modulations:
    """The layers of one model whose values are shared, and the hooks that give them to the layers."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._embedded = 0  # times that this forward has embedded a timestep

    def begin(self, *_: Any) -> None:
        self._embedded = 0

    def embedded(self, _module: nn.Module, _args: Any, embedding: torch.Tensor) -> None:
        """Give all layers their values of this embedding, `(B, D)`."""
        values = _step.get()
        self._embedded += 1
        if values is None or torch.compiler.is_compiling():
            return
        if self._embedded > 1:  # two embeddings in one forward: which layer takes which, only the model knows
            self.end()
            return
        key = (id(self), embedding.shape, embedding.dtype, embedding.device)
        if key not in values:
            values[key] = [layer(embedding) for layer in self._layers]
        for layer, value in zip(self._layers, values[key], strict=True):
            layer.shared = value

    def end(self, *_: Any) -> None:
        """The layers compute again."""
        for layer in self._layers:
            layer.__dict__.pop("shared", None)


def replace(model: nn.Module, config: Mapping[str, Any], modulation: SharedModulation) -> Callable[[], None] | None:
    """Let the layers of this model share their values within a step.

    Args:
        model: its weights may come later.
        config: the model's.
        modulation: which layers, and where their input is made.

    Returns:
        The function that undoes it; None if the model is not as it says: nothing is changed then.
    """
    layers = [m for n, m in model.named_modules() if any(fnmatch(n, pattern) for pattern in modulation.layers)]
    source = getattr(model, modulation.source, None)
    if not layers or not isinstance(source, nn.Module) or any(type(layer) is not nn.Sequential for layer in layers):
        return None
    if any(config.get(key) for key in modulation.unless):
        return None
    for layer in layers:
        layer.__class__ = SharedSequential
    sharing = _Modulations(layers)
    hooks = [
        model.register_forward_pre_hook(sharing.begin),
        source.register_forward_hook(sharing.embedded),
        model.register_forward_hook(sharing.end, always_call=True),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        sharing.end()
        for layer in layers:
            layer.__class__ = nn.Sequential

    return undo
