"""LoRA adapters beside the linear layers of a model, under any layout, without merging: W x + sum of scale B (A x).

    adapters = Adapters(model)                # parallelized, with its weights, compiled or not
    adapters.load("ink", weights)             # module name -> LowRank, whole; each rank keeps its part
    adapters.activate({"ink": 0.8})           # from the next forward on
    adapters.activate({})                     # the plain model again, to the bit

After LoRA (arXiv 2106.09685). A column-parallel layer divides B in the same way. A row-parallel layer divides A, and
its B (A x) is a term of the partial sum. So no layer communicates more than without adapters. All ranks must load and
activate the same adapters. The sequence axes need no code, because the layers work token by token.

`workers.model.lora` reads the weights from files; `workers.model.denoising` activates them for a request. PEFT is not
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
    """An adapter's term for one linear layer: adds `scaling * b @ a` to its weight `(out, in)`.

    Attributes:
        a: `(rank, in)`.
        b: `(out, rank)`.
        scaling: alpha / rank, or alpha / sqrt(rank) for an adapter that was trained with it.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0


AdapterShare = dict[str, LowRank]
"""A rank's part of an adapter, by module name, in the type and on the device of its layers."""


class Adapters:
    """The adapters of one model. Inactive adapters cost memory, but no time.

    Args:
        model: must be parallelized already, because tensor parallelism replaces layers, and have its weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._loaded: dict[str, AdapterShare] = {}
        self._active: dict[str, float] | None = {}

    @property
    def names(self) -> list[str]:
        """All loaded adapters, in order of loading."""
        return list(self._loaded)

    @property
    def active(self) -> dict[str, float]:
        """The scale of each adapter that is active; empty after an activation that was interrupted."""
        return dict(self._active or {})

    def load(self, name: str, weights: Mapping[str, LowRank]) -> None:
        """Keep this rank's part of an adapter, on the device and in the dtype of its layers. It is not active yet.

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
        """Replace all adapters by these, none of them active. It cannot fail, so either all ranks do it or none.

        Args:
            shares: the result of `share` for each, by name.
        """
        self.activate({})
        self._loaded = dict(shares)

    def unload(self, name: str) -> None:
        """Forget an adapter. Other active adapters stay active.

        Raises:
            ValueError: no adapter has this name.
        """
        self._check_names([name])
        self.activate({other: scale for other, scale in self.active.items() if other != name})
        del self._loaded[name]

    def activate(self, scales: Mapping[str, float]) -> None:
        """Make these adapters active, each as strong as its scale, and no others.

        A layer computes only two more thin products, however many adapters are active: their As are stacked, and their
        scaled Bs are put side by side. Blocks are compiled again for each new set of adapted layers, and once if the
        sum of the adapters' ranks differs from the first; not for other scales or a combination that was compiled
        before.

        Args:
            scales: by name; 0 means inactive. Empty gives the plain model.

        Raises:
            ValueError: an adapter is not loaded, or a scale is not a finite number. Nothing is changed.
        """
        self._check_names(scales)
        for name, scale in scales.items():
            if not math.isfinite(scale):
                raise ValueError(f"the scale of adapter {name!r} is {scale}, expected a finite number")
        requested = {name: float(scale) for name, scale in scales.items() if scale}
        if requested == self._active:
            return
        self._active = None  # some layers have others, should memory run out half-way
        for module in dict.fromkeys(module for parts in self._loaded.values() for module in parts):
            terms = [(self._loaded[n][module], s) for n, s in requested.items() if module in self._loaded[n]]
            _set_terms(self._model.get_submodule(module), terms)
        self._active = requested

    def _check_names(self, names: Any) -> None:
        unknown = [name for name in names if name not in self._loaded]
        if unknown:
            known = ", ".join(map(repr, self._loaded)) or "none"
            raise ValueError(f"no adapter named {unknown[0]!r} is loaded; loaded: {known}")

    def _layer(self, name: str, module: str) -> nn.Linear:
        where = f"adapter {name!r} has weights for {module!r}, which"
        try:
            layer = self._model.get_submodule(module)
        except AttributeError:
            model = type(self._model).__name__
            raise ValueError(f"{where} {model} does not have; is it for another model?") from None
        if type(layer) not in (*_ADAPTED, *_PLAIN):  # a subclass may compute something else
            raise ValueError(f"{where} is a {type(layer).__name__}; only nn.Linear takes adapters")
        assert isinstance(layer, nn.Linear)
        if layer.weight.is_meta:
            raise ValueError(f"{where} has no weights yet; load the model's own first")
        return layer


class _Adapted(nn.Linear):
    """A layer with active adapters.

    The adapters' tensors are not buffers, so that they stay out of state dicts. They are plain attributes of a class
    that is not torch's own, so that torch.compile treats the adapter's rank as a symbol.
    """

    adapter_a: torch.Tensor
    adapter_b: torch.Tensor

    def add(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """Add B (A x) to `output` in place: a separate addition would cost more than both products."""
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
    """This rank's part of an adapter. B is scaled before it is rounded to the layer's dtype."""
    a, b = given.a, given.b
    if isinstance(layer, ColumnParallelLinear):
        b = b.index_select(0, layer.index.to(b.device))
    elif isinstance(layer, RowParallelLinear):
        a = a.index_select(1, layer.index.to(a.device))
    if given.scaling != 1:
        b = b.to(torch.promote_types(b.dtype, torch.float32)) * given.scaling
    return LowRank(a.detach().to(layer.weight), b.detach().to(layer.weight))


def _set_terms(layer: nn.Module, terms: list[tuple[LowRank, float]]) -> None:
    """Give a layer exactly these adapters. The module and its hooks stay; its class changes."""
    if not terms:
        layer.__dict__.pop("adapter_a", None)
        layer.__dict__.pop("adapter_b", None)
        layer.__class__ = _PLAIN.get(type(layer), type(layer))
        return
    scaled = [part.b if scale == 1 else part.b * scale for part, scale in terms]
    layer.adapter_a = torch.cat([part.a for part, _ in terms]) if len(terms) > 1 else terms[0][0].a
    layer.adapter_b = torch.cat(scaled, dim=1) if len(terms) > 1 else scaled[0]
    layer.__class__ = _ADAPTED.get(type(layer), type(layer))
