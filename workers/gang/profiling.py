"""A profile of the steps of one request on one rank: a trace for Perfetto, and the operators that take longest.

Asked for by `POST /v1/profiles`. torch's profiler records while the rank takes its steps. It makes them slower, so
their seconds are not those of other requests.
"""

import gzip
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from workers.errors import RequestFailed
from workers.messages import Operator, Profiled
from workers.model.step_ends import StepEnd

MOST_OPERATORS = 20

FAST = 1
"""Of gzip: a trace has megabytes, of which this leaves a tenth."""


class StepProfile:
    """Of the steps of one request.

    Args:
        rank: the number of the rank.
        wanted: else nothing is recorded.
        device: of the rank.
    """

    def __init__(self, rank: int, wanted: bool, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        self._rank, self._on_cuda = rank, on_cuda
        self._profile = profile(activities=activities) if wanted else None
        self._seconds = self._communication = self._waiting = 0.0
        self._steps = 0

    def around(self, steps: Iterator[tuple[StepEnd, float]]) -> Iterator[tuple[StepEnd, float]]:
        """The same steps, while the profiler records."""
        if self._profile is None:
            yield from steps
            return
        with self._profile:
            for end, waited in steps:
                self._steps += 1
                self._seconds += end.seconds
                self._communication += sum((end.in_collectives or {}).values())
                self._waiting += waited
                yield end, waited

    def report(self) -> Iterator[Profiled]:
        """What was recorded; nothing, if nothing was wanted. Call it after the last step.

        Raises:
            RequestFailed: the folder for temporary files cannot be used.
        """
        if self._profile is None:
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._profile.export_chrome_trace(str(file := Path(folder) / "trace.json"))
                trace = gzip.compress(file.read_bytes(), FAST, mtime=0)
        except OSError as error:  # no rank waits for this one anymore: the ranks are sound
            raise RequestFailed(f"rank {self._rank} cannot write its profile: {error}") from error
        yield Profiled(
            rank=self._rank,
            trace=trace,
            operators=self._operators(),
            steps=self._steps,
            seconds=self._seconds,
            communication_seconds=self._communication,
            waiting_seconds=self._waiting,
        )

    def _operators(self) -> tuple[Operator, ...]:
        assert self._profile is not None
        found = [
            Operator(each.key, each.count, each.self_cpu_time_total / 1e6, each.self_device_time_total / 1e6)
            for each in self._profile.key_averages()
        ]
        longest = sorted(found, key=lambda each: each.device_seconds if self._on_cuda else each.host_seconds)
        return tuple(reversed(longest[-MOST_OPERATORS:]))
