"""The way back from a parallel model to the plain one. Made by `sp_core.parallelize` and `sp_core.hooks`."""

from collections.abc import Callable

from sp_core.region import SequenceContext


class Handle:
    """Undoes the changes to a model, the last one first. `remove()` may be called more than once.

    Args:
        undo: a function for each change, in the order in which the changes were made.
        context: the context of the model, for the attention between split and gather; None if nothing is split.
        irreversible: why the model cannot be made plain again; empty if it can.
    """

    def __init__(
        self, undo: list[Callable[[], None]], context: SequenceContext | None = None, irreversible: str = ""
    ) -> None:
        self._undo = undo
        self._irreversible = irreversible
        self.context = context

    def remove(self) -> None:
        """Give the plain model back.

        Raises:
            RuntimeError: that is not possible. Nothing is undone, and the model goes on computing in parallel.
        """
        if self._irreversible:
            raise RuntimeError(self._irreversible)
        while self._undo:
            self._undo.pop()()
