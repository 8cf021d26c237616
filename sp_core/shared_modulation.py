"""Modulation computed once: each rank computes some layers, and the forwards of one step share what they can.

Each block turns one embedding of the timestep into its shifts, scales and gates (adaLN). These layers see one row per
sample, so their time is that of reading their weights: a third of Qwen-Image's. All sequence ranks, and all tensor
ranks, would read the same weights for the same row. Instead, each rank computes its share of the layers as soon as the
embedding is there, and one gather gives all values to all ranks, before the blocks need them.

A guided step is two forwards at one timestep. If the embedding depends on nothing else, the second forward takes the
values of the first. Requests of one size with the same number of steps also have the same timesteps. If a rank is given
the timestep, it keeps its share of the values, and reads no weights again for a schedule that it has seen:

    with same_timestep(t):     # all forwards inside have this timestep
        model(**prompted)
        model(**unprompted)    # its layers return the values of the first forward

Values are kept by timestep, not by request, so requests may take steps in turns; a batch is kept as one row. One
product for all steps at once would help the first request too, but would not give the same bits, and it would need to
know how each model makes the embedding of a timestep.

The layers' own forward computes the values, so adapters and parallel layers take part. Ranks divide whole layers, not
rows: a stacked weight would need the memory of all layers twice. Declared as `SharedModulation` in a family's file,
called by `sp_core.replacements`; `workers.model.denoising` opens the steps.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatch
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from sp_core import collectives, torch_private
from sp_core.degrees import AxisName, ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.models.family import SharedModulation
from sp_core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

_Key = tuple[Any, ...]
_Values = list[torch.Tensor]

KEPT_BYTES = 2**28
"""Bytes kept for a model on each rank; the least recently used go. 50 steps of Qwen-Image take 221 MB in bf16."""


@dataclass(frozen=True)
class _Step:
    timestep: float | None
    values: dict[_Key, _Values] = field(default_factory=dict)


_step: ContextVar[_Step | None] = ContextVar("step", default=None)


@contextmanager
def same_timestep(timestep: float | None = None) -> Iterator[None]:
    """All forwards inside have the same timestep, and the same active adapters: layers may share their modulation.

    A step inside a step stands for itself.

    Args:
        timestep: of all samples, if its values may be kept for other steps: no adapter is active, and no weight will
            change. None: nothing is kept.
    """
    token = _step.set(_Step(timestep))
    try:
        yield
    finally:
        _step.reset(token)


def replace(
    model: nn.Module, config: Mapping[str, Any], modulation: SharedModulation, mesh: ParallelMesh
) -> Callable[[], None] | None:
    """Make ranks and forwards share the values of this model's layers.

    Args:
        model: its weights may come later.
        config: the config of the model.
        modulation: which layers, and where their input is made.
        mesh: the ranks.

    Returns:
        The function that undoes it; None if the model is not as declared, and nothing is changed.
    """
    layers = [m for n, m in model.named_modules() if any(fnmatch(n, pattern) for pattern in modulation.layers)]
    source = getattr(model, modulation.source, None)
    if not layers or not isinstance(source, nn.Module) or not all(_is_as_expected(layer) for layer in layers):
        return None
    if any(config.get(key) for key in modulation.unless):
        return None
    sharing = _Modulations(layers, modulation, mesh)
    for layer in layers:
        layer.shared = None
        layer.forward = MethodType(_shared_or_own, layer)  # not of another class: adapters change that of linear layers
    hooks = [
        model.register_forward_pre_hook(sharing.begin),
        source.register_forward_hook(sharing.embedded),
        model.register_forward_hook(sharing.end, always_call=True),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            del layer.shared, layer.forward

    return undo


def _shared_or_own(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """The forward of a layer, `(B, in)` to `(B, out)`: the shared value, if it has one."""
    shared: torch.Tensor | None = layer.shared
    return type(layer).forward(layer, input) if shared is None else shared


@dataclass(frozen=True)
class _Shares:
    """The axes over which the layers are divided, the layers of each rank, and those of this rank."""

    axes: list[AxisName]
    dealt: list[list[int]]
    mine: list[int]


class _Modulations:
    """The layers of one model whose values are shared, and the hooks that give them to the layers."""

    def __init__(self, layers: Sequence[Any], modulation: SharedModulation, mesh: ParallelMesh) -> None:
        self._layers = layers
        self._linears = [_linear(layer) for layer in layers]
        self._modulation = modulation
        self._mesh = mesh  # not its groups, which must end with it, while a module may live forever
        self._widths = [linear.out_features for linear in self._linears]
        self._shares: dict[ParallelDegrees, _Shares] = {}  # by layout: those of an elastic gang change theirs
        self._kept: OrderedDict[_Key, torch.Tensor] = OrderedDict()  # this rank's values, packed
        self._kept_bytes = 0
        self._held: dict[_Key, _Values] = {}  # what the layers are given, at addresses that stay
        self._embedded = -1  # times that this forward has embedded a timestep; negative: no forward is running

    def begin(self, *_: Any) -> None:
        self._embedded = 0

    @property
    def _share(self) -> "_Shares":
        """How the ranks divide the layers in the current layout."""
        degrees = self._mesh.degrees
        if degrees not in self._shares:
            axes = _sharing(self._linears, self._mesh) if self._modulation.across_ranks else []
            place, ranks = 0, 1
            for axis in map(self._mesh.axis, axes):
                place, ranks = place + axis.rank * ranks, ranks * axis.size
            dealt = _deal(self._widths, ranks)
            self._shares[degrees] = _Shares(axes, dealt, dealt[place])
        return self._shares[degrees]

    def embedded(self, _module: nn.Module, _args: Any, embedding: torch.Tensor) -> None:
        """Give all layers their values of this embedding, `(B, D)`."""
        if torch.compiler.is_compiling() or self._embedded < 0 or self._mesh.is_alone:
            return
        self._embedded += 1
        step = _step.get() if self._modulation.timestep_only else None
        if (step is None and not self._share.axes) or not self._are_beside(embedding):
            return
        if self._embedded > 1:  # two embeddings in one forward: which layer takes which, only the model knows
            self._forget()
            return
        key = (id(self), embedding.shape, embedding.dtype, embedding.device)
        if step is None or key not in step.values:
            values = self._values(embedding, None if step is None else step.timestep)
            if step is not None:
                step.values[key] = values
        else:
            values = step.values[key]
        if not torch.is_grad_enabled():
            values = self._at_fixed_addresses(key, values)
        for layer, value in zip(self._layers, values, strict=True):
            layer.__dict__["shared"] = value  # a module's own way to set an attribute takes ten times as long

    def _at_fixed_addresses(self, key: _Key, values: _Values) -> _Values:
        """The same values at the addresses of the last forward's.

        torch.compile takes a module's tensors for parameters, and a CUDA graph keeps their addresses: at new addresses
        it would record every block again in each step.
        """
        if key not in self._held:
            self._held[key] = [value.clone() for value in values]
        else:
            torch_private.copy_each(self._held[key], values)
        return self._held[key]

    def end(self, *_: Any) -> None:
        """The forward is over: the layers compute again."""
        self._embedded = -1
        self._forget()

    def _forget(self) -> None:
        for layer in self._layers:
            layer.__dict__["shared"] = None

    def _are_beside(self, embedding: torch.Tensor) -> bool:
        """Whether the weights of all layers have the device and dtype of the embedding; some may be offloaded or
        quantized. The answer is the same on all ranks, because they all have all layers.
        """
        weights = {(linear.weight.device, linear.weight.dtype) for linear in self._linears}
        plain = not torch.is_autocast_enabled(embedding.device.type)
        return plain and weights == {(embedding.device, embedding.dtype)}

    def _values(self, embedding: torch.Tensor, timestep: float | None) -> _Values:
        """The output of each layer for the embedding, `(B, D)`. A collective of the ranks that share."""
        keeps = timestep is not None and not torch.is_grad_enabled()
        share = self._share
        packed = self._own_of_timestep(embedding, timestep) if keeps else self._own(embedding)
        for axis in map(self._mesh.axis, share.axes):
            packed = torch.cat(collectives.all_gather_equal(packed, axis))
        values: dict[int, torch.Tensor] = {}
        for dealt, row in zip(share.dealt, packed.chunk(len(share.dealt)), strict=True):
            widths = [self._widths[i] for i in dealt]
            made = row.expand(len(embedding), -1).split([*widths, row.shape[1] - sum(widths)], dim=1)
            values.update(zip(dealt, made, strict=False))  # the last is padding
        return [values[i] for i in range(len(self._layers))]

    def _own(self, embedding: torch.Tensor) -> torch.Tensor:
        """The outputs of this rank's layers side by side, padded to the widest share of any rank."""
        given = silu(embedding) if self._modulation.silu else embedding
        share = self._share
        most = max(sum(self._widths[i] for i in dealt) for dealt in share.dealt)
        missing = most - sum(self._widths[i] for i in share.mine)
        return torch.cat([*(self._layers[i](given) for i in share.mine), given.new_zeros(len(given), missing)], dim=1)

    def _own_of_timestep(self, embedding: torch.Tensor, timestep: float | None) -> torch.Tensor:
        """One row for all samples, since they have the same timestep."""
        # Batches differ in their last bits, layouts in the layers of each rank.
        key = (timestep, embedding.shape, embedding.dtype, embedding.device, self._mesh.degrees)
        if key not in self._kept:
            self._kept[key] = self._own(embedding[:1])
            self._kept_bytes += self._kept[key].nbytes
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return self._kept[key]


def _is_as_expected(layer: nn.Module) -> bool:
    """Whether it is a linear layer, or ends with one, and still has its own forward."""
    linear = _linear(layer)
    return isinstance(linear, nn.Linear) and "forward" not in vars(layer)


def _linear(layer: nn.Module) -> Any:
    return layer[-1] if type(layer) is nn.Sequential and len(layer) else layer


def _sharing(linears: Sequence[nn.Linear], mesh: ParallelMesh) -> list[AxisName]:
    """The axes whose ranks have the same layers and the same embedding, the innermost first."""
    parts = any(isinstance(linear, ColumnParallelLinear | RowParallelLinear) for linear in linears)
    axes: list[AxisName] = ["sequence"] if parts else ["tp", "sequence"]
    return [name for name in axes if mesh.axis(name).size > 1]


def _deal(widths: Sequence[int], ranks: int) -> list[list[int]]:
    """The layers of each rank: the widest first, each to the rank with the least to do."""
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for layer in sorted(range(len(widths)), key=lambda i: -widths[i]):
        min(dealt, key=lambda taken: sum(widths[i] for i in taken)).append(layer)
    return [sorted(taken) for taken in dealt]
