"""The state that a request takes to other ranks, as bytes.

`workers.model.denoising` packs the embeddings and the state that the steps have changed; the `Denoising` of the same
request on other ranks unpacks them.
"""

import io
from typing import Any

import torch


def packed(values: Any) -> bytes:
    """Tensors and plain values as bytes, which `unpacked` reads without unpickling anything else."""
    written = io.BytesIO()
    torch.save(values, written)
    return written.getvalue()


def unpacked(data: bytes, device: torch.device, keep_on_host: bool = False) -> Any:
    """The values that `packed` was given, with their tensors on a device.

    Args:
        data: the result of `packed`.
        device: the device of this rank.
        keep_on_host: whether tensors that were on the host stay there; schedulers keep some there.
    """

    def place(storage: Any, at: str) -> Any:
        return storage if at == "cpu" else storage.to(device=device)

    return torch.load(io.BytesIO(data), map_location=place if keep_on_host else device, weights_only=True)


def state_of(scheduler: Any) -> dict[str, Any]:
    """The attributes of a scheduler that a request takes along: all except its configuration and callables."""
    return {name: value for name, value in vars(scheduler).items() if _moves(name, value)}


def _moves(name: str, value: Any) -> bool:
    return name != "_internal_dict" and not callable(value)
