"""Finds where a parallel forward departs from the plain one, by comparing the outputs of all modules share by share.

`sp_core.verify.verify` and `workers.gang.self_test` record a plain and a parallel forward of the same model and inputs
on each rank, and ask for the first module whose output is neither the plain output nor this rank's part of it.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from sp_core.region import RunningForward
from sp_core.token_layout import TokenLayout

Measure = Callable[[torch.Tensor, torch.Tensor], float]
"""Measures the distance of an output from its reference of the same shape."""


class Divergence(NamedTuple):
    """The first output of a module that differs.

    Attributes:
        place: the place of the output among those of the plain forward, and so the same on all ranks.
        module: the name of the module.
        how: the shape of the output, and by how much it differs.
    """

    place: int
    module: str
    how: str

    def __str__(self) -> str:
        return f"{self.module!r}, {self.how}"


class Recording:
    """All tensors that the modules of a model return inside the block, in order, on the host.

    Args:
        model: the model. Its modules may be called several times.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []
        self.outputs: list[tuple[str, torch.Tensor]] = []
        """By module name."""
        self._places: list[list[tuple[torch.Tensor, int]]] = []
        """For each output: possible positions of a share's tokens in the whole, -1 for padding, and their number."""

    def __enter__(self) -> "Recording":
        for name, module in self._model.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(self._recorder(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in tensors_of(output):
                real = torch.view_as_real(tensor) if tensor.is_complex() else tensor  # as replaced rotations are
                self.outputs.append((name, real.detach().to("cpu", copy=True)))
                self._places.append(_places())

        return record

    def first_divergence(
        self, plain: "Recording", bar: float, exact: "Recording | None" = None, parts: tuple[int, int] = (0, 1)
    ) -> Divergence | None:
        """The first module whose output differs from that of a plain forward; None: none does.

        Args:
            plain: the same forward on one rank.
            bar: by how much an output may differ.
            exact: for a model in half precision, the same forward in fp32. Outputs may then be twice as far from it as
                the plain ones, by `spread`, plus the bar.
            parts: the part of features that this rank may have, `(rank, size)`, if ranks share layers.
        """
        references = plain.by_module()
        exacts = references if exact is None else exact.by_module()
        seen: defaultdict[str, int] = defaultdict(int)
        place = 0
        for (name, share), places in zip(self.outputs, self._places, strict=True):
            call, seen[name] = seen[name], seen[name] + 1
            if name not in references or name not in exacts:
                return Divergence(place, name, "which one process does not call")
            # A module that shares out its work may be called more often than on one process, for the same output.
            (place, reference), (_, precise) = (
                each[name][min(call, len(each[name]) - 1)] for each in (references, exacts)
            )
            measure, allowed = error, bar
            if exact is not None and reference.shape == precise.shape:
                measure, allowed = spread, bar + 2 * spread(reference, precise)
            candidates = (_differences(share, part, places, measure) for part in _parts(precise, share, *parts))
            by = min(itertools.chain.from_iterable(candidates), default=0.0)  # the shapes may allow no comparison
            if not by <= allowed:
                return Divergence(place, name, f"whose output {tuple(share.shape)} differs by {by:.1e}")
        return None

    def by_module(self) -> dict[str, list[tuple[int, torch.Tensor]]]:
        """The outputs of each module, in the order of its calls, each with its place among all."""
        found: defaultdict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        for place, (name, output) in enumerate(self.outputs):
            found[name].append((place, output))
        return found


def _parts(whole: torch.Tensor, share: torch.Tensor, rank: int, size: int) -> Iterator[torch.Tensor]:
    """The parts of a module's output on one process that it may return if ranks share its layers."""
    yield whole
    for dim in range(whole.ndim if size > 1 and whole.ndim == share.ndim else 0):
        if whole.shape[dim] == share.shape[dim] * size:
            yield whole.chunk(size, dim)[rank]


def _places() -> list[tuple[torch.Tensor, int]]:
    """Index and count for each stream of the running forward, and for all of them side by side."""
    forward = RunningForward.innermost()
    layout = forward.region.layout(gathered=True) if forward is not None else None
    if forward is None or layout is None:
        return []
    cpu = torch.device("cpu")
    streams = dict.fromkeys([*forward.region.streams.values(), *forward.region.companions])
    layouts = [TokenLayout((stream,), layout.rank) for stream in streams]
    return [(each.own_order(cpu), each.local) for each in ([*layouts, layout] if layout.order_known else layouts)]


def _differences(
    share: torch.Tensor, whole: torch.Tensor, places: list[tuple[torch.Tensor, int]], measure: Measure
) -> Iterator[float]:
    """The differences to all parts of `whole` that `share` may be."""
    if share.shape == whole.shape:
        yield measure(share, whole)
    dims = [d for d in range(min(share.ndim, whole.ndim)) if share.shape[d] != whole.shape[d]]
    if share.ndim == whole.ndim and len(dims) <= 1:
        for dim in dims or range(share.ndim):
            for index, local in places:
                if share.shape[dim] == local and whole.shape[dim] > int(index.max()):
                    real = index >= 0
                    mine = share.index_select(dim, real.nonzero().flatten())
                    yield measure(mine, whole.index_select(dim, index[real]))


def error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, in units of max(1, max|reference|); infinite if either holds NaN.

    NaN itself is never returned: Python's max and min would drop it.
    """
    if not reference.numel():
        return 0.0
    output, reference = (
        t.double() if not t.is_complex() else torch.view_as_real(t).double() for t in (output, reference)
    )
    by = float((output - reference).abs().max()) / max(1.0, float(reference.abs().max()))
    return math.inf if math.isnan(by) else by


def spread(output: torch.Tensor, reference: torch.Tensor) -> float:
    """The root mean square of the difference, in units of that of the reference; infinite if either holds NaN.

    For half precision, in which the largest of a few differences is a matter of luck.
    """
    if not reference.numel():
        return 0.0
    output, reference = output.double(), reference.double()
    scale = max(float(reference.square().mean().sqrt()), 1e-12)
    by = float((output - reference).square().mean().sqrt()) / scale
    return math.inf if math.isnan(by) else by


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors of a module's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]
