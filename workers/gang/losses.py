"""Losses: which ranks of a gang live, and which end with one that is lost.

Kept by `workers.gang.rank_group`, which kills those that it names. A rank may wait in a collective for any other that
runs the same request, and without end if that one is lost; so they end together. In a gang that is not elastic this is
true of all. In an elastic one the others go on, on groups without the lost ones, until the gang ends them.
"""

import contextlib
from collections.abc import Iterator, Set


class Losses:
    """Those of one group of ranks.

    Args:
        count: how many ranks there are.
        elastic: whether requests have ranks of their own.

    Attributes:
        gone: ranks that are lost while others live.
        reason: of the latest loss; empty: there was none.
        all: whether all ranks are lost, or ended.
    """

    def __init__(self, count: int, elastic: bool) -> None:
        self.gone: Set[int] = frozenset()
        self.reason = ""
        self.all = False
        self._count, self._elastic = count, elastic
        self._together: dict[object, Set[int]] = {}

    @property
    def living(self) -> Set[int]:
        """Ranks that are not lost."""
        return frozenset() if self.all else self.everyone - self.gone

    @property
    def everyone(self) -> Set[int]:
        """All ranks."""
        return frozenset(range(self._count))

    @contextlib.contextmanager
    def together(self, ranks: Set[int]) -> Iterator[None]:
        """These ranks may wait for one another. Whoever is done may leave the set."""
        key = object()
        self._together[key] = ranks
        try:
            yield
        finally:
            del self._together[key]

    def lose(self, rank: int | None, reason: str) -> Set[int]:
        """A rank is lost, or, if nobody knows which, all are. All are, too, if some were lost before.

        Returns:
            Who has to end now; nobody, if that was known.
        """
        if self.all or rank in self.gone:
            return frozenset()
        living, self.reason = self.living, reason
        lost = living if rank is None or self.gone or not self._elastic else self._ending_with(rank)
        if lost == living:
            self.all = True
        else:
            self.gone = lost
        return lost

    def end(self) -> Set[int]:
        """Nobody needs those that live. Returns them."""
        living, self.all = self.living, True
        return living

    def _ending_with(self, rank: int) -> Set[int]:
        """Who may wait for it, and who may wait for these in turn."""
        lost, before = {rank}, 0
        while len(lost) > before:
            before = len(lost)
            lost.update(*(ranks for ranks in self._together.values() if not lost.isdisjoint(ranks)))
        return frozenset(lost)
