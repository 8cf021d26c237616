"""Tensors that lie on the CPU and say that they are on cuda:0, and the mode that computes with them.

Unlike fake tensors they have values: what depends on one runs, and is noted as a wait of the host. Plain tensors stay
plain, so that numpy, files and gloo work on what is on the host. Where a GPU would refuse to mix the two, so do these.
"""

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.support.fake_cuda.attention import STAND_INS, AttendsAsOnCuda
from tests.support.fake_cuda.calls import Call
from tests.support.fake_cuda.events import Queue, event_class
from tests.support.fake_cuda.guard import register_guard
from tests.support.fake_cuda.seen import Seen

CUDA = torch.device("cuda", 0)

_MAY_MIX = frozenset({"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"})
"""Operators that take tensors of both devices; those that then wait are noted."""


class PretendCuda(torch.Tensor):
    """A tensor on cuda:0, by its own account.

    Attributes:
        host: its values, on the CPU.
    """

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "PretendCuda":
        made: PretendCuda = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=CUDA,
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{operator} of a tensor on a pretended GPU, outside of pretending")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendCuda({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> "PretendCuda":
        return self.clone()  # type: ignore[return-value]

    def tolist(self) -> Any:
        """The values, for which the host waits."""
        return self.cpu().tolist()

    def __array__(self, *_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class Pretending(TorchDispatchMode):
    """Inside, what is made on CUDA is a pretended tensor, and operators compute with the values of such tensors.

    Args:
        seen: where to note.
        groups: the names of the process groups that would be NCCL's; the others are of hosts.
        queue: what the device has still to do for the host.
    """

    def __init__(self, seen: Seen, groups: set[str], queue: Queue) -> None:
        super().__init__()
        self._queue = queue
        self._seen = seen
        self._groups = groups

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "prim":  # a question about a tensor
            return operator(*args, **(kwargs or {}))
        call = Call(operator, args, kwargs)
        if call.is_collective:
            group = call.group
            self._seen.exchange(call, group is not None and group.group_name in self._groups)
        else:
            self._look_at(call)
            if call.copies_later:
                target, source = call.tensors
                with _disable_current_modes():
                    self._queue.copy(target, _on_host(source))
                return target
        call.kwargs.pop("pin_memory", None)  # a build for CPU has none
        on_host = [tree_map(_on_host, part) for part in (args, call.kwargs)]
        made = STAND_INS.get(operator, operator)(*on_host[0], **on_host[1])
        known = {id(_on_host(tensor)): tensor for tensor in call.tensors}
        device = call.kwargs.get("device")
        on_cuda = call.on_cuda if device is None else device.type == "cuda"

        def placed(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in known:  # computed in place
                return known[id(value)]
            return PretendCuda(value) if on_cuda else value

        answer = tree_map(placed, made)
        self._seen.computed(call, answer)
        return answer

    def _look_at(self, call: Call) -> None:
        if call.wait:
            self._seen.wait(call.wait)
        generator = call.kwargs.get("generator")
        device = call.kwargs.get("device") or (CUDA if call.on_cuda else None)
        if generator is not None and device is not None and generator.device.type != device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{generator.device}'")
        plain = [tensor for tensor in call.tensors if not tensor.is_cuda and tensor.ndim]
        if call.on_cuda and plain and call.name not in _MAY_MIX:
            self._seen.fault(f"{call.name} of tensors on cuda and on the CPU")
            raise RuntimeError(f"{call.name} needs all tensors on one device, found them on cuda:0 and on the CPU")


def _on_host(value: Any) -> Any:
    if isinstance(value, PretendCuda):
        return value.host
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


def move(module: nn.Module) -> None:
    """As `module.to("cuda")`: parameters and registered buffers, and nothing else."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is None or isinstance(tensor, PretendCuda):
                    continue
                moved: Any = PretendCuda(tensor.detach())
                moved._is_param = isinstance(tensor, nn.Parameter)
                store[name] = moved


@contextmanager
def pretended(seen: Seen, groups: set[str]) -> Iterator[None]:
    """Inside, there is a GPU by all accounts.

    Args:
        seen: where to note.
        groups: the names of the process groups that would be NCCL's; the others are of hosts.
    """
    register_guard()
    queue = Queue()
    patches: list[AbstractContextManager[object]] = [
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: seen.wait("synchronizes")),
        mock.patch.object(torch.cuda, "Event", event_class(queue, seen)),
        mock.patch.object(torch, "save", functools.partial(_save, torch.save, seen)),
        mock.patch.object(torch, "load", functools.partial(_load, torch.load, seen)),
    ]
    with ExitStack() as stack:
        # Constants are then made on the CPU and moved by an operator, which a mode sees.
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        for patch in (*patches, AttendsAsOnCuda(), Pretending(seen, groups, queue)):
            stack.enter_context(patch)
        yield


def _save(save: Callable[..., None], seen: Seen, value: object, file: io.BytesIO) -> None:
    """A file has the values; each tensor is copied to the host."""
    if any(isinstance(leaf, PretendCuda) for leaf in tree_leaves(value)):
        seen.wait("copies from cuda to cpu to save")
    save(tree_map(lambda leaf: leaf.host if isinstance(leaf, PretendCuda) else leaf, value), file)


def _load(load: Callable[..., Any], seen: Seen, file: io.BytesIO, map_location: torch.device, **options: Any) -> Any:
    value = load(file, map_location="cpu", **options)
    if map_location.type == "cpu":
        return value
    seen.wait("copies from cpu to cuda to load")
    return tree_map(lambda leaf: PretendCuda(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)
