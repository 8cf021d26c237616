"""Steps for a person to see: a bar on a terminal, plain lines elsewhere. Used by `spray generate` and the demo."""

import shutil
import sys
from types import TracebackType
from typing import Never, Self

from tqdm import tqdm

from workers.messages import StepEvent


class StepProgress:
    """A context manager whose `show` is called after each step. Writes to standard error."""

    def __init__(self) -> None:
        self._bar: tqdm[Never] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, event: StepEvent) -> None:
        """One step is done. Steps start again from 1 when a request is retried on another gang."""
        if not sys.stderr.isatty():
            sys.stderr.write(f"step {event.step}/{event.total_steps} {event.seconds:.3f} s\n")
            return
        if self._bar is None:
            columns, rows = shutil.get_terminal_size()  # 80 x 24 where the terminal does not know its size
            bar: tqdm[Never] = tqdm(total=event.total_steps, unit="step", file=sys.stderr, ncols=columns, nrows=rows)
            self._bar = bar
        self._bar.update(event.step - self._bar.n)
