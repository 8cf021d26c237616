"""The live process groups of one rank, made from `ParallelDegrees`, each with an explicit timeout.

`workers.gang.rank` makes a mesh once per rank; so can anyone who has initialized `torch.distributed`. Collectives take
a `MeshAxis`; nothing else in the package touches a process group.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from sp_core.degrees import AXES, AxisName, ParallelDegrees, axis_groups
from sp_core.traffic import Traffic

_numbers = itertools.count()
_axes: WeakValueDictionary[int, "MeshAxis"] = WeakValueDictionary()
"""Weak: an axis dies with its mesh."""


@dataclass(frozen=True)
class MeshAxis:
    """One rank's view of one axis. Axes with the same ranks share their groups, since one thread makes all calls in
    order.

    Attributes:
        name: the axis; `"sequence"` is ring and ulysses taken together, `"gang"` all ranks.
        rank: this process's place on the axis, `0 <= rank < size`.
        size: the number of ranks on the axis. 1 makes every collective over it a no-op.
        group: the process group, `None` exactly when `size` is 1.
        host_group: the same ranks over gloo, for integers that must not go through the device.
        traffic: counts what this rank sends; shared by all axes of the mesh.
        share_of_sum: the share of a tensor that each rank sends in an all-reduce, by the best algorithm.
        number: finds this axis from inside a compiled graph, which takes only plain arguments.
    """

    name: AxisName
    rank: int
    size: int
    group: dist.ProcessGroup | None
    host_group: dist.ProcessGroup | None
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)
    share_of_sum: float = field(init=False, compare=False, repr=False)
    number: int = field(init=False, default_factory=lambda: next(_numbers), compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "share_of_sum", 2 * (self.size - 1) / self.size)  # it is frozen
        _axes[self.number] = self

    @classmethod
    def numbered(cls, number: int) -> "MeshAxis":
        """The axis of this number."""
        return _axes[number]


class ParallelMesh:
    """The groups that this process belongs to, one per axis of `("cfg", "ring", "ulysses", "tp")`.

    Attributes:
        degrees: the layout.
        device: where this rank's tensors live.
        control: a gloo group over all ranks for decisions (host integers, never tensors on the device).
        traffic: counts what this rank sends, except decisions.
    """

    def __init__(
        self,
        degrees: ParallelDegrees,
        device: torch.device,
        axes: dict[AxisName, MeshAxis],
        control: dist.ProcessGroup | None,
    ) -> None:
        self.degrees = degrees
        self.device = device
        self.control = control
        self.traffic = axes["gang"].traffic
        self._axes = axes
        self._layouts = {degrees: (axes, control)}

    @classmethod
    def create(
        cls,
        degrees: ParallelDegrees,
        *,
        device_type: str,
        timeout_s: float,
        control_timeout_s: float | None = None,
        smaller: Sequence[ParallelDegrees] = (),
    ) -> "ParallelMesh":
        """Build this rank's groups; every rank of the world must call it, with the same arguments.

        Args:
            degrees: the layout; its product must be the world size.
            device_type: `"cpu"` (gloo) or `"cuda"` (NCCL; this rank uses the current CUDA device).
            timeout_s: seconds after which a collective of any of these groups fails. Explicit, because sub-groups
                do not inherit the timeout of `init_process_group`.
            control_timeout_s: the same for decisions, for which a rank may wait while another loads; None: `timeout_s`.
            smaller: layouts of fewer ranks, for `use`. Each is made on every block of that many ranks, side by side.

        Raises:
            RuntimeError: `torch.distributed` is not initialized although the layout has more than one rank.
            ValueError: the world size is not the product of the degrees, or the kind of device is unknown.
        """
        if device_type not in ("cpu", "cuda"):
            raise ValueError(f"device_type must be 'cpu' or 'cuda', got {device_type!r}")
        initialized = dist.is_available() and dist.is_initialized()
        if degrees.world_size > 1 and not initialized:
            raise RuntimeError(
                f"the layout {degrees} needs {degrees.world_size} ranks: call "
                "torch.distributed.init_process_group on each of them before ParallelMesh.create"
            )
        world_size = dist.get_world_size() if initialized else 1
        if degrees.world_size != world_size:
            raise ValueError(
                f"the layout {degrees} is for {degrees.world_size} ranks, but the process group has {world_size}; "
                "the product of the degrees must be the number of ranks"
            )
        device = (
            torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
        )
        makers = _Groups(timedelta(seconds=timeout_s), timedelta(seconds=control_timeout_s or timeout_s))
        traffic = Traffic(on_cuda=device_type == "cuda")
        layouts = {each: makers.layout(each, world_size, traffic) for each in (degrees, *smaller)}
        mesh = cls(degrees, device, *layouts[degrees])
        mesh._layouts = layouts
        return mesh

    def use(self, degrees: ParallelDegrees) -> None:
        """Switch to this layout, in which this rank belongs to one block. Not a collective, but all ranks of a block
        must call it.

        Args:
            degrees: the layout of the mesh, or one of its `smaller` layouts.
        """
        axes, self.control = self._layouts[degrees]
        self.degrees, self._axes = degrees, dict(axes)

    @property
    def axes(self) -> tuple[MeshAxis, ...]:
        """This rank's place and group on every axis, in the order in which all ranks made them."""
        return tuple(self._axes.values())

    def axis(self, name: AxisName) -> MeshAxis:
        """This rank's place and group on the axis `name`."""
        return self._axes[name]

    @property
    def layouts(self) -> tuple[ParallelDegrees, ...]:
        """The layouts that it may `use`, the gang's own first."""
        return tuple(self._layouts)

    @property
    def shares_sequence(self) -> bool:
        """Whether ranks share a sequence in any of the layouts that it may `use`."""
        return any(degrees.sequence_parallel_size > 1 for degrees in self._layouts)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, each axis has only this rank. For the reference of a self-test; see `sp_core.verify.alone`."""
        axes = dict(self._axes)
        self._axes.update({name: MeshAxis(name, 0, 1, None, None, self.traffic) for name in axes})
        try:
            yield
        finally:
            self._axes.update(axes)

    @property
    def is_alone(self) -> bool:
        """Whether `alone` is active in a mesh of several ranks."""
        return self._axes["gang"].size < self.degrees.world_size

    def agree(self, *flags: int) -> tuple[int, ...]:
        """The element-wise maximum of `flags` over all ranks: one decision, the same everywhere.

        A collective on the control group. Every rank of the gang must call it at the same point, with equally many
        flags.
        """
        if self.degrees.world_size == 1:
            return flags
        assert self.control is not None
        word = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(word.tolist())

    def broadcast(self, value: bytes | None) -> bytes:
        """Rank 0's value, on all ranks, whatever the others pass, if anything. A collective on the control group."""
        if self.degrees.world_size == 1:
            assert value is not None
            return value
        assert self.control is not None
        began = time.perf_counter()
        length = torch.tensor([len(value or b"")])  # as tensors: torch's way for objects unpickles what comes in
        dist.broadcast(length, group_src=0, group=self.control)
        if not length:
            return b""
        carried = torch.empty(int(length), dtype=torch.uint8)
        if value is not None and len(value) == length:  # else it is another rank's own, of another length
            carried = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        dist.broadcast(carried, group_src=0, group=self.control)
        sent = 0 if value is None else (self.degrees.world_size - 1) * len(value)
        self.traffic.broadcast(sent, time.perf_counter() - began)
        return carried.numpy().tobytes()

    def close(self) -> None:
        """Drop all groups. The mesh cannot be used afterwards.

        A group's threads end only with the last reference to it, and a model that was parallelized over this mesh may
        be kept forever: diffusers caches methods by their module, with that module's hooks.
        """
        self._axes.clear()
        self._layouts.clear()
        self.control = None


Layout = tuple[dict[AxisName, MeshAxis], dist.ProcessGroup | None]
"""The axes of one rank, and its control group."""


class _Groups:
    """Makes groups, each once: layouts share groups of the same ranks. All ranks must ask for the same groups in order.

    Args:
        timeout: of collectives.
        patience: of collectives of control groups.
    """

    def __init__(self, timeout: timedelta, patience: timedelta) -> None:
        self._timeout, self._patience = timeout, patience
        self._made: dict[tuple[str | None, timedelta, tuple[int, ...]], dist.ProcessGroup] = {}

    def layout(self, degrees: ParallelDegrees, world_size: int, traffic: Traffic) -> Layout:
        """This rank's place in one of the blocks of a layout, side by side over all ranks."""
        blocks = range(0, world_size, degrees.world_size)
        groups = {
            name: [[first + rank for rank in ranks] for first in blocks for ranks in within]
            for name, within in axis_groups(degrees).items()
        }
        axes: dict[AxisName, MeshAxis] = {}
        for name in ("gang", "sequence", *AXES):
            same = next((axes[other] for other in axes if groups[other] == groups[name]), None)
            axes[name] = replace(same, name=name) if same else self._axis(name, groups[name], traffic)
        alone = degrees.world_size == 1
        return axes, None if alone else self._of(groups["gang"], "gloo", self._patience)

    def _axis(self, name: AxisName, groups: list[list[int]], traffic: Traffic) -> MeshAxis:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        mine = next(ranks for ranks in groups if rank in ranks)
        if len(mine) == 1:
            return MeshAxis(name, 0, 1, None, None, traffic)
        group = self._of(groups, None, self._timeout)
        host_group = group if dist.get_backend(group) == "gloo" else self._of(groups, "gloo", self._timeout)
        return MeshAxis(name, mine.index(rank), len(mine), group, host_group, traffic)

    def _of(self, groups: list[list[int]], backend: str | None, timeout: timedelta) -> dist.ProcessGroup:
        """The group of this rank. Missing groups are made, by all ranks alike."""
        for ranks in groups:
            key = backend, timeout, tuple(ranks)
            if key not in self._made:
                self._made[key] = dist.new_group(ranks, timeout=timeout, backend=backend)
        rank = dist.get_rank()
        mine = next(ranks for ranks in groups if rank in ranks)
        return self._made[backend, timeout, tuple(mine)]
