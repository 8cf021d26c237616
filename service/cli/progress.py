"""Progress for a person to see: bars on a terminal, plain lines elsewhere. For the command line and the demo."""

import shutil
import sys
from collections.abc import Mapping, Sequence
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


class LoadBars:
    """How far each model is loaded; a context manager. Writes to standard error.

    Args:
        models: their names, in the order of the bars.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self._told: dict[str, int] = {}
        self._bars: dict[str, tqdm[Never]] = {}
        if sys.stderr.isatty():
            columns, rows = shutil.get_terminal_size()
            width = max(len(model) for model in models)
            self._bars = {
                model: tqdm(
                    total=100, desc=model.ljust(width), position=i, file=sys.stderr, ncols=columns, nrows=rows,
                    bar_format="{desc} |{bar}| {n:3.0f} %",
                )
                for i, model in enumerate(models)
            }  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for bar in self._bars.values():
            bar.close()

    def show(self, loaded: Mapping[str, float]) -> None:
        """How far each model is now, from 0 to 1; 1 is serving, or asleep as it is meant to."""
        for model, fraction in loaded.items():
            percent = int(100 * fraction)
            if model in self._bars:
                self._bars[model].update(max(0, percent - self._bars[model].n))
            elif percent // 25 > self._told.get(model, -1):  # a line for every quarter is enough for a log
                self._told[model] = percent // 25
                sys.stderr.write(f"{model}: {'ready' if percent == 100 else f'{percent} % loaded'}\n")
