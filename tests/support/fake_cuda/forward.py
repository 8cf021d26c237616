"""One forward of a full-width transformer on fake tensors, as one rank of a layout would run it, watched.

The way in is the project's: build without weights, parallelize, fill by share, forward. No weight and no activation has
memory, so that a laptop does it in a second.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sp_core.batched_guidance import guidance_batch
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from tests.support.fake_cuda.attention import AttendsAsOnCuda
from tests.support.fake_cuda.calls import Call
from tests.support.fake_cuda.families import BF16, FullWidth
from tests.support.fake_cuda.guard import register_guard
from tests.support.fake_cuda.seen import Seen, device_tensors
from tests.support.fake_cuda.world import device_groups, kernel_chosen, one_rank
from tests.support.guided import batched_step, guided_step
from tests.support.traffic import Bytes, Meter
from workers.model import weights

Run = Callable[[nn.Module, Callable[[], dict[str, Any]], ParallelMesh], object]
"""Runs a model once, on inputs that it makes."""


_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What fake tensors raise where a value would be needed."""


class Watch(TorchDispatchMode):
    """Writes down what each operator would mean on a GPU. Fake tensors below refuse mixed devices and values."""

    def __init__(self, seen: Seen, groups: set[str]) -> None:
        super().__init__()
        self._seen = seen
        self._groups = groups

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "prim":  # a question about a tensor
            return operator(*args, **(kwargs or {}))
        seen, call = self._seen, Call(operator, args, kwargs)
        if call.is_collective:
            group = call.group
            seen.exchange(call, group is not None and group.group_name in self._groups)
            return operator(*args, **call.kwargs)
        if call.wait:
            seen.wait(call.wait)
        try:
            made = operator(*args, **call.kwargs)
        except _NEEDS_VALUES:
            if not call.wait:
                seen.wait(f"reads a value ({call.name})")
            raise
        except RuntimeError as error:
            seen.fault(str(error).partition("\n")[0])
            raise
        if not seen.computed(call, made) and call.starts_kernel and tree_leaves(made):
            seen.fault(f"{call.name} runs on the CPU")
        return made


@dataclass(frozen=True)
class Watched:
    """What one rank did.

    Attributes:
        loading: while it read its weights.
        forward: in its second run; what is made once is made by then. In its first, if that is refused.
        sent: bytes to other ranks in that run.
        refused: why the run could not end; its place is among the faults or the waits.
    """

    loading: Seen
    forward: Seen
    sent: Bytes
    refused: str = ""


def plain(model: nn.Module, make_inputs: Callable[[], dict[str, Any]], mesh: ParallelMesh) -> object:
    """One forward."""
    return model(**make_inputs(), return_dict=False)


def guided(model: nn.Module, make_inputs: Callable[[], dict[str, Any]], mesh: ParallelMesh) -> object:
    """One guided step: both branches, or with groups for guidance one of them and the exchange of predictions."""
    return guided_step(model, (make_inputs(), make_inputs()), mesh.axis("cfg"))


def batched(model: nn.Module, make_inputs: Callable[[], dict[str, Any]], mesh: ParallelMesh) -> object:
    """One guided step in one forward."""
    batch, first = guidance_batch(model), make_inputs()
    assert batch is not None
    prediction, apart = batched_step(model, (first, first | {batch.prompt: make_inputs()[batch.prompt]}))
    assert not apart, apart
    return prediction


def watch_forward(
    model: FullWidth,
    degrees: ParallelDegrees,
    rank: int,
    *,
    layers: int = 2,
    run: Run = plain,
    kernel: str = "torch-cudnn",
) -> Watched:
    """Load a model as one rank of a layout, and run it twice.

    Args:
        model: which.
        degrees: the layout.
        rank: the rank.
        layers: of each kind.
        run: what to run: `plain`, `guided` or `batched`.
        kernel: the attention kernel that counts as the fastest, by its name in `sp_core.cuda_kernels`.
    """
    register_guard()
    loading, refused = Seen(), ""
    with one_rank(degrees, rank) as mesh, kernel_chosen(kernel), torch.no_grad():
        built = _built(model, layers)
        whole = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        handle = parallelize(built, mesh, dtype=BF16, kernel=kernel)
        groups = device_groups(mesh)
        with FakeTensorMode(allow_non_fake_inputs=True), AttendsAsOnCuda():
            with Watch(loading, groups), _files_of(whole):
                weights.fill(built, Path(), mesh.device, BF16)
            for name, tensor in (*built.named_parameters(), *built.named_buffers()):
                if not tensor.is_cuda:
                    loading.fault(f"{name} stays on {tensor.device.type}")
            try:
                for _ in range(2):
                    forward, meter = Seen(), Meter()
                    with Watch(forward, groups), meter:
                        outputs = tree_leaves(run(built, model.inputs, mesh))
                if not device_tensors(outputs):
                    forward.fault("the output is not on cuda")
            except (RuntimeError, *_NEEDS_VALUES) as error:
                refused = f"{type(error).__name__}: {error}"
        if degrees.tensor_parallel_size == 1:
            handle.remove()
    return Watched(loading, forward, meter.sent, refused)


def _built(model: FullWidth, layers: int) -> nn.Module:
    """Without weights; what is not in the files, such as tables of frequencies, is made for real."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model.config(layers)))
        return weights.build(Path(folder))


@contextmanager
def _files_of(whole: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Inside, any folder has a file with tensors of these shapes, of which a rank reads its parts."""

    def read(path: Path, names: list[str], parts: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            shape = list(whole[name])
            if parts[name] is not None:
                dim, index = parts[name]
                shape[dim] = len(index)
            yield name, torch.empty(shape, dtype=BF16)

    with (
        mock.patch.object(weights, "verified_files", lambda *_: dict.fromkeys(whole, Path())),
        mock.patch.object(weights, "_read", read),
        mock.patch.object(weights, "ThreadPoolExecutor", _ThisThread),
        mock.patch.object(weights, "Staging", _PlainCopies),
    ):
        yield


class _PlainCopies:
    """Instead of pinned memory and streams, which need a driver; `tests/workers/test_staging.py` has those."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)

    def finish(self) -> None:
        pass

    @staticmethod
    def release() -> None:
        pass


class _ThisThread(Executor):
    """Instead of threads, in which no mode would be active."""

    def __init__(self, _: int) -> None:
        super().__init__()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args, **kwargs))
        return done
