"""Runs a parallelized model as one rank would compute it: the reference of a gang's self-test.

    with alone([model], mesh):               # a collective of the ranks that share weights
        plain = model(**inputs)
    with alone([model], mesh), in_fp32():
        exact = model(**inputs)

Inside `alone` every axis of the mesh has only this rank, so nothing is split and attention is local. A layer of which
the rank holds a part gathers its whole weight when it runs, and drops it afterwards, so at most one layer is whole at a
time. Nothing is compiled. Called by `workers.gang.self_test`; no other forward may run meanwhile.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from sp_core import collectives
from sp_core.mesh import MeshAxis, ParallelMesh
from sp_core.models.lookup import find_family
from sp_core.tensor_parallel import AcrossHeadsRMSNorm, ColumnParallelLinear, RowParallelLinear

HALF = (torch.bfloat16, torch.float16)

CONVERSIONS = {torch.Tensor.half, torch.Tensor.bfloat16}


@contextmanager
def alone(models: Iterable[nn.Module], mesh: ParallelMesh) -> Iterator[None]:
    """Inside, these models compute as on one rank. All ranks must run the same forwards of them.

    Args:
        models: parallelized over the mesh, with their weights.
        mesh: the ranks.
    """
    tp = mesh.axis("tp")
    with ExitStack() as undo:
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        for module in (module for model in models for module in model.modules() if tp.size > 1):
            _make_whole(module, tp, undo)
        undo.enter_context(mesh.alone())
        yield


def _make_whole(module: nn.Module, tp: MeshAxis, undo: ExitStack) -> None:
    """Make a module compute with the weights of all ranks."""
    if "heads_of_all_ranks" in vars(module):
        undo.callback(setattr, module, "heads", module.heads)
        module.heads = module.heads_of_all_ranks
    if "narrows" in vars(module):
        undo.callback(setattr, module, "narrows", module.narrows)
        module.narrows = False  # type: ignore[assignment]
    whole: Callable[[torch.Tensor], torch.Tensor]
    if isinstance(module, ColumnParallelLinear):
        whole = partial(_columns, module, tp)
    elif isinstance(module, RowParallelLinear):
        whole = partial(_rows, module, tp)
    elif isinstance(module, AcrossHeadsRMSNorm):
        whole = partial(_norm, module, tp)
    else:
        return
    before = vars(module).get("forward")  # a replacement may have given it one of its own
    undo.callback(_restore, module, before)
    module.forward = whole  # type: ignore[method-assign]


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _columns(layer: ColumnParallelLinear, tp: MeshAxis, input: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else _gathered(layer.bias, 0, layer.index, tp)
    return linear(input, _gathered(layer.weight, 0, layer.index, tp), bias)


def _rows(layer: RowParallelLinear, tp: MeshAxis, input: torch.Tensor) -> torch.Tensor:
    return linear(input, _gathered(layer.weight, 1, layer.index, tp), layer.bias)


def _norm(layer: AcrossHeadsRMSNorm, tp: MeshAxis, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = _gathered(layer.weight, 0, layer.index, tp)
    return layer.normed(hidden_states, hidden_states.float().square().sum(dim=-1, keepdim=True), weight)


def _gathered(part: torch.Tensor, dim: int, index: torch.Tensor, tp: MeshAxis) -> torch.Tensor:
    """A whole parameter, from the ranks' parts."""
    # A copy, which `in_fp32` makes one of fp32: what is sent and what receives it must be of one type.
    parts = collectives.all_gather_equal(part.detach().movedim(dim, 0).clone(), tp)
    order = torch.cat(collectives.all_gather_equal(index.to(part.device), tp))
    return torch.cat(parts)[order.argsort()].movedim(0, dim)


def rounds(model: nn.Module) -> bool:
    """Whether its forward rounds to half precision, whatever dtype it has."""
    family = find_family(kind.__name__ for kind in type(model).__mro__)
    return family is not None and bool(family.rounds)


@contextmanager
def in_fp32() -> Iterator[None]:
    """Inside, all computations in half precision are done in fp32, whatever the code says.

    Weights are converted where they are used, one layer at a time.
    """
    with _Widened():
        yield


class _Widened(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if function in CONVERSIONS:
            return _wide(args[0])
        given = [_wide(each) for each in args]
        if (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__"):
            given[:1] = args[:1]  # is written to
        return function(*given, **{key: _wide(value) for key, value in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    """The same with fp32 instead of half precision: tensors, types, and those in lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in HALF else value
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALF else value
    return type(value)(map(_wide, value)) if type(value) in (list, tuple) else value
