"""When the steps of a request end on the device, how long they took, and whether their latents are finite.

`Denoising.step` marks each end. On a GPU the mark is an event in the stream, with a flag that is copied to the host
behind it. The host learns both with one wait, and may have queued the next step before. On a CPU a step has ended when
it is marked.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from sp_core.traffic import InCollectives, Op


@dataclass(frozen=True)
class StepEnd:
    """One step has ended.

    Attributes:
        step: 1 for the first.
        seconds: since the end of the step before, or since the first began; on the device's clock.
        finite: whether the latents hold neither infinity nor NaN, from which a decoder would make black pictures.
        in_collectives: seconds of the step by kind of collective; None: not measured.
    """

    step: int
    seconds: float
    finite: bool
    in_collectives: dict[Op, float] | None = None


class StepEnds:
    """The step ends of one request. Made when the first step begins.

    Args:
        device: computes the steps, in its current stream.
        total_steps: the number of steps.
        done: steps that other ranks have done before.
    """

    def __init__(self, device: torch.device, total_steps: int, done: int = 0) -> None:
        self._done = done
        self._on_cuda = device.type == "cuda"
        # False until the device has said otherwise. Pinned, because the host would wait for a copy to other memory.
        self._finite = torch.zeros(total_steps, dtype=torch.bool, pin_memory=self._on_cuda)
        self._marks = [self._mark()]
        self._in_collectives: list[InCollectives | None] = []

    def mark(self, latents: torch.Tensor, in_collectives: InCollectives | None = None) -> None:
        """Mark the end of the next step, which has made these latents. The host does not wait."""
        self._in_collectives.append(in_collectives)
        self._finite[len(self._marks) - 1].copy_(latents.isfinite().all(), non_blocking=True)
        self._marks.append(self._mark())

    def wait(self, step: int) -> StepEnd:
        """Wait until the device has ended a marked step, `done < step`.

        Raises:
            RuntimeError: the device has failed, in this step or one before.
        """
        place = step - self._done
        begin, end = self._marks[place - 1], self._marks[place]
        if self._on_cuda:
            end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3 if self._on_cuda else end - begin
        spent = self._in_collectives[place - 1]
        return StepEnd(step, seconds, bool(self._finite[place - 1]), spent.seconds() if spent else None)

    def _mark(self) -> Any:  # an event, or seconds
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
