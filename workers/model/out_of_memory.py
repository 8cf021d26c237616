"""Recognizes a lack of device memory, and says which size would fit.

Called by `workers.gang.rank`. The request is not repeated, because it would fail again.
"""

import gc
from pathlib import Path
from typing import TypeGuard

import torch

from deploy.activations import Request, activation_bytes, largest_fitting
from deploy.memory import format_bytes
from deploy.model_spec import ModelSpec
from workers.messages import GenerationRequest

ALLOCATORS_SAY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "Cuda failure 2 'out of memory'",  # NCCL
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no room for its workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",
)
"""Messages of errors without a class of their own."""

LIBRARIES_SAY = (
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "CUBLAS_STATUS_MAPPING_ERROR",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_MAPPING_ERROR",
)
"""Messages of a library that is the first to notice a failed device. torch raises them as plain `RuntimeError`."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device or this machine had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS_SAY)


def is_device_failure(error: BaseException | None) -> TypeGuard[RuntimeError]:
    """Whether a device computes nothing anymore: after an illegal access, all that follows in its process fails."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or any(words in str(error) for words in LIBRARIES_SAY)


def free_memory(device: torch.device) -> int | None:
    """Release memory that no tensor holds; return the free bytes of a GPU, None on CPU."""
    gc.collect()
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def advice(model: ModelSpec, request: GenerationRequest, free: int | None) -> str:
    """A message that says what did not fit, and what would.

    Args:
        model: its `source` is the folder.
        request: what was asked for.
        free: bytes that activations may take; None if unknown.
    """
    asked = Request(request.width, request.height, request.num_frames, request.n)
    needed = activation_bytes(model, Path(model.source), asked)
    need = f", about {format_bytes(needed)} are needed" if needed is not None else ""
    there = f" ({format_bytes(free)} are free{need})" if free is not None else ""
    fits = largest_fitting(model, Path(model.source), asked, free) if free is not None else None
    smaller = f"{fits} would fit" if fits else "ask for fewer pixels, frames or pictures"
    return f"{model.name!r} has too little memory for {asked}{there}: {smaller}"
