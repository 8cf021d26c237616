"""Loads a transformer; each rank reads only its share.

The model is built without weights, parallelized, and then filled from safetensors files, slice by slice: no rank ever
holds a tensor that it does not keep. Called by `workers.model.loader`.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from deploy.model_folder import read_config
from deploy.safetensors_headers import headers_by_file
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.sp_plan import SequenceParallelModelPlan
from workers.model.diffusers_internals import stays_fp32
from workers.model.staging import Staging

READ_AT_ONCE = 32 * 2**20
"""Bytes after which a file is opened again: while it is open, its read pages count as this process's memory."""

FILES_AT_ONCE = 4
"""Threads that read for a GPU: one cannot read as fast as a disk, or copy as fast as the bus."""


def load_transformer(
    folder: Path,
    mesh: ParallelMesh,
    dtype: torch.dtype,
    kind: type[nn.Module] | None = None,
    plan: SequenceParallelModelPlan | None = None,
    on_progress: Callable[[float], None] = lambda loaded: None,
    kernel: str | None = None,
) -> nn.Module:
    """Build a diffusers transformer on this rank's device, parallelized over `mesh`. All ranks must call it.

    Args:
        folder: the transformer's folder, with `config.json` and safetensors.
        mesh: the ranks.
        dtype: of the weights, except those that the class keeps in fp32.
        kind: its class; None: the diffusers class that its config names.
        plan: where to split and gather; None: see `parallelize`.
        on_progress: called with the share of the tensors that is read, from 0 to 1.
        kernel: see `parallelize`.

    Raises:
        RuntimeError: the attention kernel does not work here.
        ValueError: see `build`; the layout or the plan does not fit the model, or the files are not the
            weights of this class.
    """
    model = build(folder, kind)
    parallelize(model, mesh, plan, dtype=dtype, kernel=kernel)
    fill(model, folder, mesh.device, dtype, on_progress)
    return model.eval()


def build(folder: Path, kind: type[nn.Module] | None = None) -> nn.Module:
    """Build a transformer without weights, but with the buffers that its files do not have.

    Args:
        folder: with its `config.json`.
        kind: its class; None: the diffusers class that its config names.

    Raises:
        ValueError: diffusers has no such class, or the class refuses the config.
    """
    config = read_config(folder / "config.json")
    name = str(config.get("_class_name"))
    found: Any = kind or getattr(diffusers, name, None)
    if found is None:
        raise ValueError(f"{folder} is a {name}, which diffusers does not have; set transformer_class")
    try:
        with init_empty_weights(include_buffers=False):  # frequency tables and such are made for real
            model: nn.Module = found.from_config(config)
    except Exception as error:  # the class's own code runs
        raise ValueError(f"{folder}: {found.__name__} refuses its config: {type(error).__name__}: {error}") from error
    return model


def verified_files(model: nn.Module, folder: Path) -> dict[str, Path]:
    """The file of each tensor, after a look at all names and shapes. No tensor is read.

    Raises:
        ValueError: the files have not exactly the tensors of the model, or one of another shape.
    """
    expected, by_file = model.state_dict(keep_vars=True), headers_by_file(folder)
    headers = {name: info for tensors in by_file.values() for name, info in tensors.items()}
    missing, surplus = sorted(set(expected) - set(headers)), sorted(set(headers) - set(expected))
    if missing or surplus:
        raise ValueError(
            f"{folder} does not hold the weights of {type(model).__name__}: missing {missing[:5]}, "
            f"surplus {surplus[:5]}"
        )
    for name, info in headers.items():
        if getattr(expected[name], "part", None) is None and info.shape != expected[name].shape:
            raise ValueError(f"{name} of {folder} is {info.shape}, expected {tuple(expected[name].shape)}")
    return {name: file for file, tensors in by_file.items() for name in tensors}


def fill(
    model: nn.Module,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[float], None] = lambda loaded: None,
    at_once: int | None = None,
) -> None:
    """Read this rank's share of all parameters and buffers of a model that was built without weights.

    Args:
        model: without weights.
        folder: with its files.
        device: of the weights.
        dtype: of the weights, except those that the class keeps in fp32.
        on_progress: called with the share of the tensors that is read, from 0 to 1, by any thread.
        at_once: files that are read at once; None: several for a GPU, one for the CPU, where ranks share the cores.

    Raises:
        ValueError: the files do not hold exactly the tensors of the model, or one has another shape.
    """
    expected, files = model.state_dict(keep_vars=True), verified_files(model, folder)
    parts = {name: getattr(tensor, "part", None) for name, tensor in expected.items()}
    counting, count = threading.Lock(), 0

    def fill_from(path: Path) -> None:
        nonlocal count
        staging = Staging(device) if device.type == "cuda" else None
        for name, tensor in _read(path, [name for name, file in files.items() if file == path], parts):
            if tensor.shape != expected[name].shape:
                raise ValueError(f"{name} of {folder} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
            kind = _dtype_of(name, tensor, type(model), dtype)
            # A GPU converts faster than the CPU. On the CPU it must be a copy, for the tensor is the file's memory.
            kept = staging.move(tensor).to(kind) if staging else tensor.to(kind, copy=True)
            owner, _, leaf = name.rpartition(".")
            is_parameter = isinstance(expected[name], nn.Parameter)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=False) if is_parameter else kept)
            with counting:
                count += 1
                on_progress(count / len(expected))
        if staging:
            staging.finish()

    with ThreadPoolExecutor(at_once or (FILES_AT_ONCE if device.type == "cuda" else 1)) as threads:
        filling = [threads.submit(fill_from, path) for path in dict.fromkeys(files.values())]
        try:
            for each in filling:
                each.result()
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    if device.type == "cuda":
        Staging.release()
    _move_buffers(model, device)


def _dtype_of(name: str, tensor: torch.Tensor, kind: type[nn.Module], dtype: torch.dtype) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if stays_fp32(kind, name) else dtype


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers that the files do not have; those were made when the model was built."""
    for module in model.modules():
        for leaf, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if buffer.device != device:
                setattr(module, leaf, buffer.to(device))


def _read(path: Path, names: list[str], parts: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield these tensors of a file, or this rank's part of each. Each is valid only until the next."""
    names = list(names)
    while names:
        read = 0
        with safe_open(path, framework="pt") as file:
            while names and read < READ_AT_ONCE:
                name = names.pop()
                tensor = file.get_tensor(name) if parts[name] is None else _slices(file, name, *parts[name])
                read += tensor.nbytes
                yield name, tensor


def _slices(file: Any, name: str, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Read the rows (`dim` 0) or columns of a tensor that `index` names, in runs of neighbors."""
    whole = file.get_slice(name)
    starts = [0, *(torch.nonzero(index.diff() != 1).flatten() + 1).tolist(), len(index)]
    ranges = [(int(index[a]), int(index[b - 1]) + 1) for a, b in itertools.pairwise(starts)]
    pieces = [whole[first:end] if dim == 0 else whole[:, first:end] for first, end in ranges]
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]
