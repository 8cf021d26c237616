"""Collectives of CUDA tensors over gloo, for ranks that share one GPU, which NCCL refuses.

Each tensor goes to the CPU, through gloo, and back. Inside `staged()`, `sp_core.collectives` computes on the GPU as
ever and sends this way. On the CPU it does the same with copies, so that it can be tried there.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


class _ThenBack:
    """A request whose tensor returns to its device once it is done."""

    def __init__(self, work: Any, done: Callable[[], object]) -> None:
        self._work, self._done = work, done

    def wait(self) -> None:
        """Wait, then copy."""
        self._work.wait()
        self._done()


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


@contextlib.contextmanager
def staged() -> Iterator[None]:
    """Send everything by way of the CPU inside the block."""
    real = {name: getattr(dist, name) for name in ("all_to_all_single", "all_reduce", "send", "recv")}
    gather = gather_single()
    batch = dist.batch_isend_irecv

    def all_to_all_single(output: torch.Tensor, given: torch.Tensor, *sizes: Any, **options: Any) -> None:
        host = _host(output)
        real["all_to_all_single"](host, _host(given), *sizes, **options)
        output.copy_(host)

    def all_gather_single(output: torch.Tensor, given: torch.Tensor, **options: Any) -> None:
        host = _host(output)
        gather(host, _host(given), **options)
        output.copy_(host)

    def all_reduce(tensor: torch.Tensor, **options: Any) -> None:
        host = _host(tensor)
        real["all_reduce"](host, **options)
        tensor.copy_(host)

    def send(tensor: torch.Tensor, **options: Any) -> None:
        real["send"](_host(tensor), **options)

    def recv(tensor: torch.Tensor, **options: Any) -> None:
        host = _host(tensor)
        real["recv"](host, **options)
        tensor.copy_(host)

    def batch_isend_irecv(ops: list[dist.P2POp]) -> list[_ThenBack]:
        pairs = [(op, dist.P2POp(op.op, _host(op.tensor), group=op.group, group_peer=op.group_peer)) for op in ops]

        def back(op: dist.P2POp, host: dist.P2POp) -> Callable[[], object]:
            return (lambda: op.tensor.copy_(host.tensor)) if op.op is dist.irecv else (lambda: None)

        works = batch([host for _, host in pairs])
        return [_ThenBack(work, back(*pair)) for work, pair in zip(works, pairs, strict=True)]

    ours = (all_to_all_single, all_gather_single, all_reduce, send, recv, batch_isend_irecv)
    with contextlib.ExitStack() as patches:
        for function in ours:
            patches.enter_context(mock.patch.object(dist, function.__name__, function, create=True))
        yield


def gather_single() -> Callable[..., Any]:
    """torch's gather of equal shapes into one tensor, by the name that this release has for it."""
    found: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return found


def name_what_torch_lacks() -> str:
    """Give an older torch the name that `sp_core.collectives` calls; say whether that was needed."""
    if hasattr(dist, "all_gather_single"):
        return "yes"
    dist.all_gather_single = dist.all_gather_into_tensor
    return "no, all_gather_into_tensor stands in"
