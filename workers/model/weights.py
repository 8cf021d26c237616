"""A transformer's weights, of which each rank reads only its share.

The model is built without weights, parallelised, and then filled from safetensors files, slice by slice: no rank ever
holds a tensor that it does not keep. Called by `workers.model.loader`.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.sp_plan import SequenceParallelModelPlan

FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"

READ_AT_ONCE = 32 * 2**20
"""Bytes after which a file is opened anew: what was read of it counts as this process's memory while it is open."""


def load_transformer(
    folder: Path,
    mesh: ParallelMesh,
    dtype: torch.dtype,
    kind: type[nn.Module] | None = None,
    plan: SequenceParallelModelPlan | None = None,
    on_progress: Callable[[float], None] = lambda loaded: None,
) -> nn.Module:
    """A diffusers transformer on this rank's device, parallelised over `mesh`. All ranks must call it.

    Args:
        folder: the transformer's folder, with `config.json` and safetensors.
        mesh: the ranks.
        dtype: of the weights, except those that the class keeps in fp32.
        kind: its class; None: the one of diffusers that its config names.
        plan: where to split and gather; None: see `parallelize`.
        on_progress: told how much of the tensors is behind, from 0 to 1.

    Raises:
        ValueError: diffusers has no such class, the layout or the plan does not fit the model, or the files are not the
            weights of this class.
        OSError: a file is missing.
    """
    config = json.loads((folder / "config.json").read_text())
    found: Any = kind or getattr(diffusers, config["_class_name"], None)
    if found is None:
        raise ValueError(f"{folder} is a {config['_class_name']}, which diffusers has not; set transformer_class")
    with init_empty_weights(include_buffers=False):  # frequency tables and such are made for real
        model: nn.Module = found.from_config(config)
    parallelize(model, mesh, plan)
    fill(model, folder, mesh.device, dtype, on_progress)
    return model.eval()


def fill(
    model: nn.Module,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[float], None] = lambda loaded: None,
) -> None:
    """Read this rank's share of all parameters and buffers of a model that was built without weights.

    Raises:
        ValueError: the files have not exactly the tensors of the model, or one of another shape.
        OSError: there are no safetensors.
    """
    wanted = model.state_dict(keep_vars=True)
    kept_wide: list[str] = getattr(model, "_keep_in_fp32_modules", None) or []
    files = _files(folder)
    absent, surplus = sorted(set(wanted) - set(files)), sorted(set(files) - set(wanted))
    if absent or surplus:
        raise ValueError(
            f"{folder} does not hold the weights of {type(model).__name__}: missing {absent[:5]}, surplus {surplus[:5]}"
        )
    parts = {name: getattr(place, "part", None) for name, place in wanted.items()}
    for number, (name, tensor) in enumerate(_read(files, parts), 1):
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{name} of {folder} is {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}")
        wide = any(part in name for part in kept_wide)
        kind = torch.float32 if wide else dtype if tensor.is_floating_point() else tensor.dtype
        owner, _, leaf = name.rpartition(".")
        held = tensor.to(device, kind, copy=True)
        on_progress(number / len(wanted))
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(held, requires_grad=False)
        else:
            module._buffers[leaf] = held
    for buffer_owner in model.modules():  # those that are no part of the files
        for leaf, buffer in buffer_owner._buffers.items():
            if buffer is not None and buffer.device != device:
                buffer_owner._buffers[leaf] = buffer.to(device)


def _files(folder: Path) -> dict[str, Path]:
    """In which file each tensor lies."""
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        return {name: folder / file for name, file in index["weight_map"].items()}
    if not (folder / FILE).exists():
        raise FileNotFoundError(f"{folder} has neither {FILE} nor {INDEX}; only safetensors are read")
    with safe_open(folder / FILE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / FILE)


def _read(files: Mapping[str, Path], parts: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, or this rank's part of it, a file after the other. It is valid until the next one."""
    for path in dict.fromkeys(files.values()):
        names = [name for name, file in files.items() if file == path]
        while names:
            read = 0
            with safe_open(path, framework="pt") as file:
                while names and read < READ_AT_ONCE:
                    name = names.pop()
                    tensor = file.get_tensor(name) if parts[name] is None else _slices(file, name, *parts[name])
                    read += tensor.nbytes
                    yield name, tensor


def _slices(file: Any, name: str, dim: int, index: torch.Tensor) -> torch.Tensor:
    whole = file.get_slice(name)
    starts = [0, *(torch.nonzero(index.diff() != 1).flatten() + 1).tolist(), len(index)]
    ranges = [(int(index[a]), int(index[b - 1]) + 1) for a, b in itertools.pairwise(starts)]
    pieces = [whole[first:end] if dim == 0 else whole[:, first:end] for first, end in ranges]
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]
