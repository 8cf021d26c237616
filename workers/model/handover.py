"""What a request takes along to the ranks that go on with it, as bytes.

`workers.model.denoising` packs what the encoders have made and what the steps have changed; the `Denoising` of the same
request on other ranks unpacks it there.
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
    """What `packed` was given, with its tensors on a device.

    Args:
        data: what `packed` has returned.
        device: of this rank.
        keep_on_host: leave tensors on the host that were there: schedulers keep some of theirs there.
    """

    def place(storage: Any, at: str) -> Any:
        return storage if at == "cpu" else storage.to(device)

    return torch.load(io.BytesIO(data), map_location=place if keep_on_host else device, weights_only=True)


def state_of(scheduler: Any) -> dict[str, Any]:
    """The attributes of a scheduler that a request takes along: not its configuration, nor what it calls."""
    return {name: value for name, value in vars(scheduler).items() if _moves(name, value)}


def _moves(name: str, value: Any) -> bool:
    return name != "_internal_dict" and not callable(value)
