"""Finds runners of jobs that have died, so that their jobs need not wait until the leases end.

Comes in: the names of those who run jobs. Goes out: which of them are gone. A runner has the name of its gateway's
actor. Other clusters may share a database, and their actors cannot be seen from here: of such a runner only its lease
tells. Called by `service.jobs.runner`.
"""

import asyncio
from collections.abc import Callable, Iterable

from workers.gang.caller import is_alive


class LostRunners:
    """Which runners are gone, as one gateway sees it.

    Args:
        own: the name of its own runner.
        lives: whether an actor of this cluster lives, by its name; blocks.
    """

    def __init__(self, own: str, lives: Callable[[str], bool] = is_alive) -> None:
        self._own, self._lives = own, lives
        self._seen: set[str] = set()

    async def among(self, runners: Iterable[str], shared: bool) -> list[str]:
        """Those that are gone.

        Args:
            runners: the names; an empty one is that of a gateway outside Serve, which nobody can see.
            shared: other clusters may have runners among them. Then only those count that were seen here alive.
        """
        found = []
        for runner in set(runners) - {self._own, ""}:
            if await asyncio.to_thread(self._lives, runner):
                self._seen.add(runner)
            elif runner in self._seen or not shared:
                found.append(runner)
        self._seen.intersection_update(runners)
        return found
