"""One operator as it is called, and what the call would mean on a GPU."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

_READS_VALUES = frozenset(
    "_local_scalar_dense is_nonzero equal nonzero masked_select bincount _unique2 unique_dim unique_consecutive".split()
)
"""Operators whose result the host needs: a Python number, or a shape that depends on values."""

_COMPUTE_NOTHING = frozenset(
    "_unsafe_view _reshape_alias lift_fresh empty new_empty empty_like empty_strided new_empty_strided".split()
)
"""Operators that start no kernel, besides views."""

_ATTENTION = {
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
}

_MATMUL = frozenset({"mm", "addmm", "addmm_", "_addmm_activation", "bmm", "baddbmm", "convolution", *_ATTENTION})

_KINDS = {"alltoall_base_": "exchange", "send": "shift", "allreduce_": "sum", "_allgather_base_": "gather"}
"""Collectives by the names that `tests.support.traffic` has for them."""


class Call:
    """An operator and its arguments, before it runs.

    Attributes:
        operator: of `torch.ops`.
        args: by position.
        kwargs: by name.
        name: of the operator, without namespace and overload.
        tensors: all tensors among the arguments.
        on_cuda: whether any of them is.
    """

    def __init__(self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> None:
        self.operator = operator
        self.args = args
        self.kwargs = dict(kwargs or {})
        self.name: str = operator._opname
        self.tensors = [leaf for leaf in tree_leaves((args, self.kwargs)) if isinstance(leaf, torch.Tensor)]
        self.on_cuda = any(tensor.is_cuda for tensor in self.tensors)

    @property
    def is_collective(self) -> bool:
        """Whether it goes to a process group."""
        return bool(self.operator.namespace == "c10d")

    @property
    def kind(self) -> str:
        """Of a collective: what it exchanges, or the operator's own name."""
        return _KINDS.get(self.name, self.name)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group among the arguments of a collective."""
        leaves = tree_leaves((self.args, self.kwargs))
        boxed = [
            leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type())
        ]
        return dist.ProcessGroup.unbox(boxed[0]) if boxed else None

    @property
    def attention(self) -> str:
        """Which attention kernel it is; empty for other operators."""
        return _ATTENTION.get(self.name, "")

    @property
    def is_matmul(self) -> bool:
        """Whether arithmetic, not memory, decides how long it takes."""
        return self.name in _MATMUL

    @property
    def starts_kernel(self) -> bool:
        """Whether the device has anything to do."""
        views = self.operator.is_view or self.name in _COMPUTE_NOTHING
        return not views and not self.is_collective

    @property
    def wait(self) -> str:
        """Why the host waits for all work that is queued on the device; empty if it does not."""
        if self.on_cuda and self.name in _READS_VALUES:
            return f"reads a value ({self.name})"
        return self._wait_for_index() or self._wait_for_copy()

    @property
    def copies_later(self) -> bool:
        """Whether it copies from CUDA to memory of the host that is there already, and the host goes on meanwhile."""
        if self.name != "copy_" or not (bool(self.args[2:] and self.args[2]) or self.kwargs.get("non_blocking")):
            return False
        target, source = self.args[:2]
        return bool(source.is_cuda and not target.is_cuda)

    def _wait_for_index(self) -> str:
        """Indexing with a mask counts it first; an index on the CPU is copied over."""
        if self.name not in ("index", "index_put", "index_put_", "_index_put_impl_") or not self.args[0].is_cuda:
            return ""
        indices = [index for index in self.args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "counts a mask to index with it"
        return "" if all(index.is_cuda for index in indices) else "copies an index from cpu to cuda"

    def _wait_for_copy(self) -> str:
        """Copies wait unless they are told not to."""
        if self.name == "copy_":
            target, source, *rest = self.args
            to, free = target.device, bool(rest and rest[0]) or self.kwargs.get("non_blocking")
        elif self.name == "_to_copy":
            source, to, free = self.args[0], self.kwargs.get("device"), self.kwargs.get("non_blocking")
        else:
            return ""
        if free or to is None or to.type == source.device.type:
            return ""
        return f"copies from {source.device.type} to {to.type}"


def size_of(tensors: list[torch.Tensor]) -> int:
    """Their bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
