"""LoRA adapters beside the linear layers of a model, under any layout, without merging: W x + sum of scale B (A x).

    adapters = Adapters(model)                # parallelized, with its weights, compiled or not
    adapters.load("ink", weights)             # module name -> LowRank, whole; each rank keeps its part
    adapters.activate({"ink": 0.8})           # from the next forward on
    adapters.activate({})                     # the plain model again, to the bit

After LoRA (arXiv 2106.09685). A layer that is shared out by columns has B shared out likewise; one that is shared out
by rows has A, and its B (A x) is a part of the partial sum, so no layer communicates more than without adapters. All
ranks must load and activate the same. The sequence axes need nothing: the layers work token by token.

`workers.model.lora` reads the weights from files; whoever serves a request activates. Neither diffusers nor PEFT is
needed.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from sp_core.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class LowRank(NamedTuple):
    """What an adapter adds to one linear layer: `scaling * b @ a` to its weight `(out, in)`.

    Attributes:
        a: `(rank, in)`.
        b: `(out, rank)`.
        scaling: alpha / rank, or alpha / sqrt(rank) where the adapter was trained so.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0


AdapterShare = dict[str, LowRank]
"""A rank's part of an adapter, by module name, in the type and on the device of its layers."""


class Adapters:
    """The adapters of one model. Those that are not active cost memory, and no time.

    Args:
        model: parallelized already, because tensor parallelism replaces layers, and with its weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._loaded: dict[str, AdapterShare] = {}
        self._active: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """Of all that are loaded, in order of loading."""
        return list(self._loaded)

    @property
    def active(self) -> dict[str, float]:
        """The scale of each adapter that is active."""
        return dict(self._active)

    def load(self, name: str, weights: Mapping[str, LowRank]) -> None:
        """Keep this rank's part of an adapter, beside its layers and in their type. It is not active yet.

        Args:
            name: what `activate` will call it.
            weights: whole, the same on every rank, by module name.

        Raises:
            ValueError: the name is taken, or the weights do not fit the model. Nothing is changed.
        """
        if name in self._loaded:
            raise ValueError(f"an adapter {name!r} is loaded already; unload it first, or choose another name")
        self._loaded[name] = self.share(name, weights)

    def share(self, name: str, weights: Mapping[str, LowRank]) -> AdapterShare:
        """This rank's part of an adapter, for `replace`. Nothing is changed.

        Args:
            name: for messages.
            weights: whole, by module name.

        Raises:
            ValueError: the weights do not fit the model.
        """
        if not weights:
            raise ValueError(f"adapter {name!r} has no weights")
        layers = {module: self._layer(name, module) for module in weights}
        for module, given in weights.items():
            _check_shapes(name, module, given, layers[module])
        return {module: _part(given, layers[module]) for module, given in weights.items()}

    def replace(self, shares: Mapping[str, AdapterShare]) -> None:
        """Have exactly these adapters, none of them active. Cannot fail, so that all ranks do it or none.

        Args:
            shares: what `share` has made of each, by name.
        """
        self.activate({})
        self._loaded = dict(shares)

    def unload(self, name: str) -> None:
        """Forget an adapter; if it is active, the others stay so.

        Raises:
            ValueError: there is none of this name.
        """
        self._check_names([name])
        self.activate({other: scale for other, scale in self._active.items() if other != name})
        del self._loaded[name]

    def activate(self, scales: Mapping[str, float]) -> None:
        """Make these adapters active, each as strong as its scale, and no others.

        However many there are, a layer makes two thin products more: their A stand below each other, their B side by
        side and times their scales. Compiled blocks are compiled again for every new choice of layers that have
        adapters, and once for other ranks than the first; not for other scales, nor for what was there before.

        Args:
            scales: by name; 0 is as good as absent. Empty gives the plain model.

        Raises:
            ValueError: an adapter is not loaded, or its scale is no finite number. Nothing is changed.
        """
        self._check_names(scales)
        for name, scale in scales.items():
            if not math.isfinite(scale):
                raise ValueError(f"the scale of adapter {name!r} is {scale}, expected a finite number")
        wanted = {name: float(scale) for name, scale in scales.items() if scale}
        if wanted == self._active:
            return
        for module in dict.fromkeys(module for parts in self._loaded.values() for module in parts):
            terms = [(self._loaded[n][module], s) for n, s in wanted.items() if module in self._loaded[n]]
            _set_terms(self._model.get_submodule(module), terms)
        self._active = wanted

    def _check_names(self, names: Any) -> None:
        unknown = [name for name in names if name not in self._loaded]
        if unknown:
            known = ", ".join(map(repr, self._loaded)) or "none"
            raise ValueError(f"no adapter is loaded by the name of {unknown[0]!r}; loaded: {known}")

    def _layer(self, name: str, module: str) -> nn.Linear:
        where = f"adapter {name!r} has weights for {module!r}, which"
        try:
            layer = self._model.get_submodule(module)
        except AttributeError:
            raise ValueError(f"{where} {type(self._model).__name__} has not; is it for another model?") from None
        if type(layer) not in (*_ADAPTED, *_PLAIN):  # a subclass may compute something else
            raise ValueError(f"{where} is a {type(layer).__name__}; only nn.Linear takes adapters")
        assert isinstance(layer, nn.Linear)
        if layer.weight.is_meta:
            raise ValueError(f"{where} has no weights of its own yet; load those of the model first")
        return layer


class _Adapted(nn.Linear):
    """A layer with active adapters. Its tensors are no buffers, so that they are in no state dict, and plain
    attributes of a class that is not torch's, so that torch.compile takes the rank for a symbol.
    """

    adapter_a: torch.Tensor
    adapter_b: torch.Tensor

    def add(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """Add B (A x) to `output`, in place: a second pass over the output would cost more than both products."""
        inner = linear(input, self.adapter_a).view(-1, len(self.adapter_a))
        return output.view(-1, output.shape[-1]).addmm_(inner, self.adapter_b.t()).view_as(output)


class _AdaptedLinear(_Adapted):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.add(linear(input, self.weight, self.bias), input)


class _AdaptedColumns(_AdaptedLinear, ColumnParallelLinear):
    pass


class _AdaptedRows(_Adapted, RowParallelLinear):
    def partial(self, input: torch.Tensor) -> torch.Tensor:
        return self.add(super().partial(input), input)


_ADAPTED: dict[type, type] = {
    nn.Linear: _AdaptedLinear,
    ColumnParallelLinear: _AdaptedColumns,
    RowParallelLinear: _AdaptedRows,
}
_PLAIN = {adapted: plain for plain, adapted in _ADAPTED.items()}


def _check_shapes(name: str, module: str, given: LowRank, layer: nn.Linear) -> None:
    out, into = getattr(layer, "whole_shape", layer.weight.shape)
    a, b = tuple(given.a.shape), tuple(given.b.shape)
    if a[1:] != (into,) or b[:1] != (out,) or b[1:] != a[:1]:
        raise ValueError(
            f"adapter {name!r} has A {a} and B {b} for {module!r}, expected (rank, {into}) and ({out}, rank)"
        )


def _part(given: LowRank, layer: nn.Linear) -> LowRank:
    """What this rank needs of it. The scaling goes into B, before it is rounded to the layer's type."""
    a, b = given.a, given.b
    if isinstance(layer, ColumnParallelLinear):
        b = b.index_select(0, layer.index.to(b.device))
    elif isinstance(layer, RowParallelLinear):
        a = a.index_select(1, layer.index.to(a.device))
    if given.scaling != 1:
        b = b.to(torch.promote_types(b.dtype, torch.float32)) * given.scaling
    return LowRank(a.detach().to(layer.weight), b.detach().to(layer.weight))


def _set_terms(layer: nn.Module, terms: list[tuple[LowRank, float]]) -> None:
    """Give a layer these adapters and no others. The module stays, with its hooks; its class says what it computes."""
    if not terms:
        layer.__dict__.pop("adapter_a", None)
        layer.__dict__.pop("adapter_b", None)
        layer.__class__ = _PLAIN.get(type(layer), type(layer))
        return
    scaled = [part.b if scale == 1 else part.b * scale for part, scale in terms]
    layer.adapter_a = torch.cat([part.a for part, _ in terms]) if len(terms) > 1 else terms[0][0].a
    layer.adapter_b = torch.cat(scaled, dim=1) if len(terms) > 1 else scaled[0]
    layer.__class__ = _ADAPTED.get(type(layer), type(layer))
