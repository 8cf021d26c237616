"""Chooses the attention kernel of all ranks. Called by `sp_core.parallelize`.

Timings are noisy. Two ranks, or one rank before and after a restart, might therefore choose different kernels, whose
last digits differ, and a repeated request would give another picture. So rank 0 chooses for all ranks, and a deployment
may pin the choice.

If ranks share a sequence, a process has one choice for each device, type and head size: a later model takes the choice
of an earlier one, and a model that asks for another is refused. If no ranks share a sequence, the model calls torch's
attention, which prefers the model's kernel while the model's forward runs.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from weakref import WeakSet

import torch
from torch import nn

from sp_core import cuda_kernels
from sp_core.mesh import ParallelMesh

_users: defaultdict[tuple[torch.device, torch.dtype, int], WeakSet[nn.Module]] = defaultdict(WeakSet)
"""Models whose ranks share a sequence, by what the choice is for."""


def settle_kernel(
    model: nn.Module, mesh: ParallelMesh, dtype: torch.dtype, head_size: int | None, pinned: str | None
) -> Callable[[], None]:
    """Choose the kernel for attention without a mask. A collective of all ranks.

    Args:
        model: the model; if no ranks share a sequence, its forward gets hooks.
        mesh: the ranks.
        dtype: of queries, keys and values.
        head_size: of the model; None if unknown: each rank then chooses at its first attention.
        pinned: the name of the kernel; None: the fastest on rank 0.

    Returns:
        The function that undoes it.

    Raises:
        ValueError: the pinned kernel is unknown, cannot be used in this layout, or differs from that of another model
            of this process.
        RuntimeError: no kernel works here, or the pinned one does not.
    """
    alone = not mesh.shares_sequence
    candidates = cuda_kernels.TORCHS_OWN if alone else cuda_kernels.KERNELS
    if pinned is not None and pinned not in candidates:
        where = " where no ranks share a sequence" if alone else ""
        raise ValueError(f"attention_kernel {pinned!r} cannot be used{where}; choose from {', '.join(candidates)}")
    if mesh.device.type == "cpu":
        return lambda: None
    if dtype not in cuda_kernels.HALF or head_size is None:
        if pinned is not None:
            why = (
                f"it is for float16 and bfloat16, not {dtype}" if head_size else "the model's config names no head size"
            )
            raise ValueError(f"attention_kernel {pinned!r} cannot be used: {why}; leave it out")
        return lambda: None
    head_size += -head_size % cuda_kernels.HEAD_SIZES
    what = (mesh.device, dtype, head_size)
    shared = cuda_kernels.chosen(*what) if _users[what] and not alone else None
    if pinned and shared and pinned != shared:
        raise ValueError(
            f"attention_kernel {pinned!r} cannot be used: another model of this process attends by {shared} in {dtype} "
            f"with heads of {head_size}; choose {shared} for both, or remove() that model first"
        )
    name = pinned or shared
    if name is None and mesh.axis("gang").rank == 0:
        name = cuda_kernels.fastest(mesh.device, dtype, head_size, candidates)
    name = mesh.broadcast(None if name is None else name.encode()).decode()
    if alone:
        if not _users[what]:  # else the choice is theirs
            cuda_kernels.use(mesh.device, dtype, head_size, name)
        return _prefer_in_forwards(model, name)
    cuda_kernels.use(mesh.device, dtype, head_size, name)
    _users[what].add(model)
    return lambda: _users[what].discard(model)


def _prefer_in_forwards(model: nn.Module, name: str) -> Callable[[], None]:
    """Make torch's attention prefer this kernel while the model's forward runs; returns the function that undoes it."""
    entered: list[AbstractContextManager[None]] = []  # a forward may contain another of the same model

    def begin(*_: object) -> None:
        if not torch.compiler.is_compiling():
            preference = cuda_kernels.preferred(name)
            preference.__enter__()
            entered.append(preference)

    def end(*_: object) -> None:
        if not torch.compiler.is_compiling() and entered:
            entered.pop().__exit__(None, None, None)

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)]

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        while entered:  # forwards that were interrupted from outside
            end()

    return undo
