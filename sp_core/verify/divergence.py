"""Where a parallel forward leaves the plain one: the outputs of all modules, compared share by share.

`sp_core.verify.verify` records a plain and a parallel forward of the same model and inputs on each rank, and asks for
the first module whose output is neither the plain one's nor this rank's part of it.
"""

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from sp_core.region import RunningForward
from sp_core.token_layout import TokenLayout


class Recording:
    """All tensors that the modules of a model return inside the block, in order.

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
                self.outputs.append((name, real.detach().clone()))
                self._places.append(_places())

        return record

    def first_divergence(self, plain: "Recording", bar: float) -> str:
        """The first module whose output differs from that of a plain forward by more than `bar`, and how."""
        for (name, share), places, (plain_name, whole) in zip(self.outputs, self._places, plain.outputs, strict=False):
            if name != plain_name:
                return f"{name!r}, which is called where one process calls {plain_name!r}"
            by = _difference(share, whole, places)
            if by is not None and not by <= bar:
                return f"{name!r}, whose output {tuple(share.shape)} differs by {by:.1e}"
        return "the model's own output, after all of its modules"


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


def _difference(share: torch.Tensor, whole: torch.Tensor, places: list[tuple[torch.Tensor, int]]) -> float | None:
    """The least difference to any part of `whole` that `share` may be; None if the shapes allow no part."""
    found = [error(share, whole)] if share.shape == whole.shape else []
    dims = [d for d in range(min(share.ndim, whole.ndim)) if share.shape[d] != whole.shape[d]]
    if share.ndim == whole.ndim and len(dims) <= 1:
        for dim in dims or range(share.ndim):
            for index, local in places:
                if share.shape[dim] == local and whole.shape[dim] > int(index.max()):
                    index = index.to(share.device)
                    real = index >= 0
                    mine = share.index_select(dim, real.nonzero().flatten())
                    found.append(error(mine, whole.index_select(dim, index[real])))
    return min(found, default=None)


def error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, in units of max(1, max|reference|); infinite where either holds NaN.

    NaN itself is never returned: Python's max and min would drop it.
    """
    if not reference.numel():
        return 0.0
    output, reference = (
        t.double() if not t.is_complex() else torch.view_as_real(t).double() for t in (output, reference)
    )
    by = float((output - reference).abs().max()) / max(1.0, float(reference.abs().max()))
    return math.inf if math.isnan(by) else by


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors of a module's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]
