"""The way back from a parallel model to the plain one. Made by `sp_core.parallelize` and `sp_core.hooks`."""

from collections.abc import Callable

from sp_core.region import SequenceContext


class Handle:
    """Undoes what was applied to a model, last thing first. `remove()` may be called more than once.

    Args:
        undo: what to call, in the order in which things were applied.
        context: the model's, for the attention that runs between split and gather; None where nothing is split.
        irreversible: why the model cannot be made plain again; empty: it can.
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
            RuntimeError: it cannot be given back. Nothing is undone then: the model goes on computing in parallel.
        """
        if self._irreversible:
            raise RuntimeError(self._irreversible)
        while self._undo:
            self._undo.pop()()
