"""Finds runners of jobs that have died, so that their jobs need not wait until the leases end.

Comes in: the names of those who run jobs. Goes out: which of them are gone. A runner has the name of its gateway's
actor. Other clusters may share a store, and their actors cannot be seen from here: of a runner that was never seen
alive only its lease tells. What such strangers run takes nothing of this cluster. Called by `service.jobs.runner`.
"""

import asyncio
from collections.abc import Callable, Collection

from workers.gang.caller import is_alive

LOOK_S = 1.0
"""A look may take longer, while Ray's head is away: its answer is for the next caller."""


class LostRunners:
    """Which runners are gone, as one gateway sees it.

    Args:
        own: the name of its own runner.
        lives: whether an actor of this cluster lives, by its name; blocks.
    """

    def __init__(self, own: str, lives: Callable[[str], bool] = is_alive) -> None:
        self._own, self._lives = own, lives
        self._seen: set[str] = set()
        self.strangers: frozenset[str] = frozenset()  # at the last look: of other clusters, or gone
        self._look: asyncio.Task[list[str]] | None = None

    async def among(self, runners: Collection[str]) -> list[str]:
        """Those that are gone.

        Args:
            runners: the names; an empty one is that of a gateway outside Serve, which nobody can see.
        """
        if self._look is None:
            self._look = asyncio.create_task(asyncio.to_thread(self._gone, set(runners) - {self._own, ""}))
        await asyncio.wait([self._look], timeout=LOOK_S)
        if not self._look.done():
            return []
        look, self._look = self._look, None
        return [runner for runner in look.result() if runner in runners]

    def _gone(self, runners: set[str]) -> list[str]:
        alive = {runner for runner in runners if self._lives(runner)}
        gone = sorted(self._seen & runners - alive)
        self._seen, self.strangers = alive, frozenset(runners - alive)
        return gone
