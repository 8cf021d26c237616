"""Progress on standard error: bars on a terminal, plain lines elsewhere. For the commands and the demo."""

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from workers.messages import StepEvent


class StepProgress:
    """The steps of one request; a context manager."""

    def __init__(self) -> None:
        self._bar = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, event: StepEvent) -> None:
        """Show that a step is done. Steps start again from 1 if the request is retried on another gang."""
        if self._bar.disable:
            sys.stderr.write(f"step {event.step}/{event.total_steps} {event.seconds:.3f} s\n")
            return
        if self._task is None:  # not before: an empty bar would say that something is computed
            self._task = self._bar.add_task("", total=event.total_steps)
            self._bar.start()
        self._bar.update(self._task, completed=event.step)

    def insert(self, text: str) -> None:
        """Write raw text to the terminal, such as a picture, between the bar so far and the next."""
        self._bar.stop()
        sys.stderr.write(text)
        sys.stderr.flush()
        if self._task is not None:
            self._bar.start()


class LoadBars:
    """A bar per model for its loading; a context manager.

    Args:
        models: their names, in the order of the bars.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self._told: dict[str, int] = {}
        self._bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
            console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._tasks = {model: self._bars.add_task(model, total=1.0) for model in models}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, loaded: Mapping[str, float]) -> None:
        """Show how far each model is loaded, from 0 to 1; 1 means that it serves, or sleeps as it should."""
        for model, fraction in loaded.items():
            if not self._bars.disable:
                task = self._tasks[model]
                self._bars.update(task, completed=max(fraction, self._bars.tasks[task].completed))
                continue
            percent = int(100 * fraction)
            if percent // 25 > self._told.get(model, -1):  # a line per quarter is enough for a log
                self._told[model] = percent // 25
                sys.stderr.write(f"{model}: {'ready' if percent == 100 else f'{percent} % loaded'}\n")
