"""Tries every group of a mesh once, on the real device. Called when a gang starts, before it takes requests.

A communicator that works may still give wrong data: NCCL's all-gather over NVLink SHARP permutes the data of ranks that
are not in the order of the GPUs (nccl#1906), and every picture would be wrong without an error. The probe also opens
the communicators, so that the first request does not wait for that.
"""

from collections.abc import Callable, Iterator

import torch

from sp_core import collectives
from sp_core.mesh import MeshAxis, ParallelMesh

SIZES = (1, 1000, 2**20)
"""Elements of the messages. Libraries choose their algorithm by the size."""


class WrongGroup(RuntimeError):
    """A group returns wrong data; no request may run on it."""


def probe(mesh: ParallelMesh) -> None:
    """Run each collective over each group with known data. A collective of all ranks of the mesh.

    Raises:
        WrongGroup: on all ranks, if any received wrong data; it names the groups.
    """
    axes = _distinct(mesh)
    wrong = {axis.name: ", ".join(_wrong(axis, mesh.device)) for axis in axes}
    flags = mesh.agree(*(int(bool(wrong[axis.name])) for axis in axes)) if axes else ()
    named = [
        f"{axis.name} ({wrong[axis.name] or 'on another rank'})" for axis, flag in zip(axes, flags, strict=True) if flag
    ]
    if named:
        raise WrongGroup(
            f"wrong data on {mesh.device} from the group{'s' if named[1:] else ''} {'; '.join(named)}: this machine "
            "would draw wrong pictures; try another order of the GPUs, NCCL_NVLS_ENABLE=0, or another NCCL"
        )


def _distinct(mesh: ParallelMesh) -> list[MeshAxis]:
    """The axes of this rank with more than one rank, one for each group."""
    axes: dict[int, MeshAxis] = {}
    for axis in mesh.axes:
        if axis.group is not None:
            axes.setdefault(id(axis.group), axis)
    return list(axes.values())


def _wrong(axis: MeshAxis, device: torch.device) -> list[str]:
    """The collectives that gave wrong data on this rank. None is left out, since other ranks would wait."""
    tries: list[tuple[str, Callable[[MeshAxis, torch.device], Iterator[torch.Tensor]]]] = [
        ("all-gather", _all_gather),
        ("all-to-all", _all_to_all),
        ("shift", _shift),
        ("all-reduce", _all_reduce),
        ("gather", _gather),
    ]
    found = [(name, list(attempt(axis, device))) for name, attempt in tries]
    return [name for name, rights in found if not all(bool(right) for right in rights)]


def _filled(size: int, value: int, device: torch.device) -> torch.Tensor:
    return torch.full((size,), float(value), device=device)


def _all_gather(axis: MeshAxis, device: torch.device) -> Iterator[torch.Tensor]:
    for size in SIZES:
        parts = collectives.all_gather_equal(_filled(size, axis.rank, device), axis)
        for rank, part in enumerate(parts):
            yield (part == rank).all()


def _all_to_all(axis: MeshAxis, device: torch.device) -> Iterator[torch.Tensor]:
    """Messages of different sizes, some of them empty, like those of ranks without heads."""

    def size(sender: int, receiver: int) -> int:
        return (sender + 2 * receiver) % 3 * 1000

    everyone = range(axis.size)
    send, receive = [size(axis.rank, other) for other in everyone], [size(other, axis.rank) for other in everyone]
    packed = torch.cat([_filled(length, axis.rank * axis.size + other, device) for other, length in enumerate(send)])
    for other, part in enumerate(collectives.all_to_all(packed, send, receive, axis).split(receive)):
        yield (part == other * axis.size + axis.rank).all()


def _shift(axis: MeshAxis, device: torch.device) -> Iterator[torch.Tensor]:
    for size in SIZES:
        received = collectives.RingShift(_filled(size, axis.rank, device), (size,), axis).wait()
        yield (received == (axis.rank - 1) % axis.size).all()


def _all_reduce(axis: MeshAxis, device: torch.device) -> Iterator[torch.Tensor]:
    for size in SIZES:
        total = collectives.all_reduce(_filled(size, axis.rank, device), axis)
        yield (total == axis.size * (axis.size - 1) / 2).all()


def _gather(axis: MeshAxis, device: torch.device) -> Iterator[torch.Tensor]:
    """Tensors of different sizes, on the first rank."""
    for rank, parts in enumerate(collectives.gather([_filled(1 + axis.rank, axis.rank, device)], axis)):
        yield torch.stack([(part == rank).all() & (len(part) == 1 + rank) for part in parts]).all()
