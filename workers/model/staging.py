"""Copies tensors from files to a GPU through pinned memory, while the next part of a file is read.

A plain copy of a file's memory to a GPU stops at both ends: the driver copies a part to pinned memory of its own, sends
it, and only then takes the next. Here a few buffers take turns: one is filled while another is sent. Called by
`workers.model.weights`, with an object for each thread that reads. It has not run on a GPU yet.
"""

import itertools
import logging

import torch

logger = logging.getLogger(__name__)

BUFFERS = 2
BUFFER_BYTES = 32 * 2**20
"""Bytes of a buffer, enough to keep a bus busy. A rank has BUFFERS of them for each file that it reads at once."""


class Staging:
    """Buffers that take turns, and a stream for what they send. For one thread, whose device becomes this one.

    Args:
        device: where tensors go.
        size: bytes of each buffer.
    """

    def __init__(self, device: torch.device, size: int = BUFFER_BYTES) -> None:
        self._device = device
        # A thread begins on the first GPU. Pinning there, or leaving a stream for one there, would open a context.
        torch.cuda.set_device(device)
        self._stream = torch.cuda.Stream(device)
        self._turns = itertools.cycle([(_pinned(size), torch.cuda.Event()) for _ in range(BUFFERS)])

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device, complete for whatever its current stream does next.

        Args:
            tensor: on the CPU; it may change as soon as this returns.
        """
        current = torch.cuda.current_stream(self._device)
        moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        self._stream.wait_stream(current)  # work that is queued there may still use the memory that `moved` got
        source, target = (each.reshape(-1).view(torch.uint8) for each in (tensor, moved))
        done = 0
        while done < len(source):
            buffer, sent = next(self._turns)
            sent.synchronize()  # at once, if it was never sent
            part = buffer[: min(len(buffer), len(source) - done)]
            part.copy_(source[done : done + len(part)])
            self._send(part, target[done : done + len(part)])
            sent.record(self._stream)
            done += len(part)
        current.wait_stream(self._stream)
        return moved

    def finish(self) -> None:
        """Wait until all is sent. An error of the device shows here at the latest."""
        self._stream.synchronize()

    @staticmethod
    def release() -> None:
        """Give back the pinned memory of objects that are gone; torch would keep it for others to come."""
        if hasattr(torch.accelerator, "empty_host_cache"):  # torch 2.11 has no name for it, and keeps it
            torch.accelerator.empty_host_cache()

    def _send(self, part: torch.Tensor, target: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(part, non_blocking=True)


def _pinned(size: int) -> torch.Tensor:
    """Memory that a GPU reads by itself; without any left, a plain buffer, which is slower and as right."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        logger.warning("no pinned memory for loading, which takes longer: %s", str(error).splitlines()[0])
        return torch.empty(size, dtype=torch.uint8)
