"""Watches the ranks of a gang from its replica's process, and says when one of them is lost.

Made by `workers.gang.rank_group`, which then kills all ranks.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from deploy.spec import Timeouts
from workers.messages import RankStatus

PERIOD_S = 0.25

PROC = Path("/proc")


class Watch:
    """Looks at ranks four times a second.

    Args:
        ranks: their actors.
        statuses: what each said when it had started.
        timeouts: of the model: how long a rank may be silent, or pass no boundary.
        lose: called with the reason when a rank is lost.

    Attributes:
        statuses: the last of each rank.
    """

    def __init__(
        self, ranks: Sequence[Any], statuses: Sequence[RankStatus], timeouts: Timeouts, lose: Callable[[str], None]
    ) -> None:
        self.statuses = list(statuses)
        self._ranks = ranks
        self._timeouts = timeouts
        self._lose = lose
        self._stopped = False

    async def run(self) -> None:
        """Watch until `stop`."""
        await asyncio.gather(self._watch_processes(), self._watch_progress())

    def stop(self) -> None:
        """End the watch: the ranks are lost, whoever noticed it."""
        self._stopped = True

    async def _watch_processes(self) -> None:
        """Lose the ranks when one on this node is stopped or dead; an unanswered ping would show it much later."""
        here = ray.get_runtime_context().get_node_id()
        local = [status for status in self.statuses if status.node_id == here]
        suspects: set[int] = set()
        while not self._stopped:
            halted = {status.rank for status in local if _is_halted(status.pid)}
            for rank in halted & suspects:  # twice in a row: a debugger may stop a process for a moment
                self._lose(f"the process of rank {rank} is stopped or dead")
            suspects = halted
            await asyncio.sleep(PERIOD_S)

    async def _watch_progress(self) -> None:
        """Lose the ranks when one does not answer, or passes no boundary for too long.

        An answer alone proves nothing: it comes from the rank's control thread, while its computing thread may sit in
        a dead collective. So what counts is that `progress` grows.
        """
        limits = self._timeouts
        clock = asyncio.get_running_loop().time
        moved = [(status.progress, clock()) for status in self.statuses]
        while not self._stopped:
            # All at once, so that one silent rank delays no other's ping. Exceptions come back as values: the watch
            # itself must outlive them.
            pings = [asyncio.wait_for(_status(rank), limits.ping_s) for rank in self._ranks]
            for i, status in enumerate(await asyncio.gather(*pings, return_exceptions=True)):
                if isinstance(status, BaseException):
                    self._lose(f"rank {i} does not answer ({type(status).__name__})")
                    continue
                self.statuses[i] = status
                if status.phase == "idle" or status.progress != moved[i][0]:
                    moved[i] = (status.progress, clock())
                elif clock() - moved[i][1] > limits.phase_s:
                    self._lose(f"rank {i} is stuck in {status.phase} for {limits.phase_s:g} s")
            await asyncio.sleep(PERIOD_S)


async def _status(rank: Any) -> RankStatus:
    status: RankStatus = await rank.status.remote()
    return status


def _is_halted(pid: int) -> bool:
    """Whether a process of this machine is stopped, a zombie or gone. False on systems without /proc."""
    if not PROC.is_dir():
        return False
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] in "TtZX"
    except OSError:
        return True
