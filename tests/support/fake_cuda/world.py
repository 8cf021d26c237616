"""One rank of a world of any size, in one process: its collectives return at once and exchange nothing."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from sp_core import collectives, cuda_kernels
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh

_HOST_EXCHANGES = ("all_lengths", "on_any_rank")
"""Functions of `sp_core.collectives` that exchange integers between hosts, in plain tensors."""


@contextmanager
def one_rank(degrees: ParallelDegrees, rank: int) -> Iterator[ParallelMesh]:
    """The mesh of one rank, on cuda:0.

    What hosts exchange is not faked: every rank answers as this one does. Lengths must therefore divide evenly.
    """
    assert not dist.is_initialized()
    excepthook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degrees.world_size)
    new_group = dist.new_group
    with ExitStack() as patched:
        patched.callback(dist.destroy_process_group)
        patched.callback(setattr, sys, "excepthook", excepthook)  # it has been wrapped, and would be again each time
        patched.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        fake_group = mock.patch.object(dist, "new_group", lambda ranks=None, **_: new_group(ranks, backend="fake"))
        with fake_group:
            mesh = ParallelMesh.create(degrees, device_type="cuda", timeout_s=60)
        for name in _HOST_EXCHANGES:
            if hasattr(collectives, name):
                patched.enter_context(mock.patch.object(collectives, name, _on_host(getattr(collectives, name))))
        yield mesh


def device_groups(mesh: ParallelMesh) -> set[str]:
    """The names of the groups for tensors on devices; the others are for hosts."""
    return {axis.group.group_name for axis in mesh.axes if axis.group is not None}


@contextmanager
def kernel_chosen(name: str) -> Iterator[None]:
    """Inside, every attention kernel works and this one is the fastest: there is no device to try them on."""

    def tried(candidates: Mapping[str, Any], *_: Any) -> dict[str, float]:
        return {each: float(each != name) for each in candidates}

    with (
        mock.patch.object(cuda_kernels, "try_kernels", tried),
        mock.patch.object(cuda_kernels, "_in_use", {}),
        mock.patch.object(cuda_kernels, "preferred", lambda _: nullcontext()),
    ):
        yield


def _on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which sees plain tensors only."""

    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return call
