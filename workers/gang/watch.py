"""Watches the ranks of a gang from its replica's process, and says when one of them is lost.

Made by `workers.gang.rank_group`, which then kills it and those that may wait for it. `Watch` looks at ranks that
serve, `watch_start` at ranks that start, `watch_creation` at processes before they are ranks.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Never

import ray
from ray.exceptions import RayError, RayTaskError

from deploy.model_sections import Timeouts
from workers.errors import GangLost
from workers.gang.process_state import Activity, is_halted
from workers.gang.ray_internals import process_of
from workers.messages import RankStatus
from workers.metrics import Loss

PERIOD_S = 0.25
"""Between two looks at processes, and at ranks that work."""

CREATION_PERIOD_S = 1.0
"""Between two looks at processes that are being created: each asks Ray which they are."""

IDLE_S = 5.0
"""Between two calls of ranks that wait for a request: each costs CPU time on both sides."""

SILENT_LOAD_S = 9.0
"""A rank that loads and neither reads nor computes for this time is hung, however long loading may take, unless it may
wait for another."""


class Watch:
    """Looks at ranks: at their processes four times a second, at what they say as often while they work.

    Args:
        ranks: their actors.
        statuses: what each said when it had started.
        timeouts: of the model: how long a rank may be silent, or pass no boundary.
        lose: called with the kind of loss, the reason and the number when a rank is lost.

    Attributes:
        statuses: the last of each rank.
    """

    def __init__(
        self,
        ranks: Sequence[Any],
        statuses: Sequence[RankStatus],
        timeouts: Timeouts,
        lose: Callable[[Loss, str, int], None],
    ) -> None:
        self.statuses = list(statuses)
        self._living = set(range(len(ranks)))
        self._ranks = ranks
        self._timeouts = timeouts
        self._lose = lose
        self._stopped = False
        self._tasks = 0  # what the ranks have to do, whether or not they have said so yet
        self._woken = asyncio.Event()

    async def run(self) -> None:
        """Watch until `stop`."""
        await asyncio.gather(self._watch_processes(), self._watch_progress())

    def leave(self, ranks: Iterable[int]) -> None:
        """Look at these no more: they are lost, and others are not."""
        self._living.difference_update(ranks)

    def stop(self) -> None:
        """End the watch: the ranks are lost, whoever noticed it."""
        self._stopped = True
        self._woken.set()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Look at once, and often while this lasts: the ranks have something to do."""
        self._tasks += 1
        self._woken.set()
        try:
            yield
        finally:
            self._tasks -= 1

    async def _watch_processes(self) -> None:
        """Lose the ranks when one on this node is stopped or dead; an unanswered ping would show it much later."""
        halts = _Halts(self.statuses)
        while not self._stopped:
            for rank in halts.find() & self._living:
                self._lose("died", f"the process of rank {rank} is stopped or dead", rank)
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
            asked = sorted(self._living)
            pings = [asyncio.wait_for(_status(self._ranks[i]), limits.ping_s) for i in asked]
            for i, status in zip(asked, await asyncio.gather(*pings, return_exceptions=True), strict=True):
                if i not in self._living:
                    continue
                if isinstance(status, BaseException):
                    self._lose("silent", f"rank {i} does not answer ({type(status).__name__})", i)
                    continue
                self.statuses[i] = status
                if status.phase == "idle" or status.progress != moved[i][0]:
                    moved[i] = (status.progress, clock())
                elif clock() - moved[i][1] > limits.phase_s:
                    self._lose("stuck", f"rank {i} is stuck in {status.phase} for {limits.phase_s:g} s", i)
            await self._pause()

    async def _pause(self) -> None:
        idle = not self._tasks and all(self.statuses[i].phase == "idle" for i in self._living)
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S if idle else PERIOD_S):
                await self._woken.wait()


async def watch_creation(processes: Sequence[Any]) -> Never:
    """Look at processes of this node that have said nothing yet, until canceled.

    Raises:
        GangLost: one is stopped or dead.
    """
    here = ray.get_runtime_context().get_node_id()
    halted: set[int] = set()
    while True:
        await asyncio.sleep(CREATION_PERIOD_S)
        known = await asyncio.to_thread(lambda: [process_of(process) for process in processes])
        before, halted = halted, {pid for node, pid in filter(None, known) if node == here and is_halted(pid)}
        if found := halted & before:
            raise GangLost(f"a rank's process, {min(found)}, was stopped or died before it had said anything")


async def watch_start(ranks: Sequence[Any], statuses: Sequence[RankStatus], timeouts: Timeouts) -> Never:
    """Look at ranks that start, until canceled.

    Args:
        ranks: their actors.
        statuses: what each said when its process had begun.
        timeouts: of the model: how long a rank may be silent.

    Raises:
        GangLost: the process of one is stopped or dead, or it loads and reads nothing, or it does not answer.
    """
    halts, loading, latest = _Halts(statuses), _Loading(statuses), list(statuses)
    pings = [asyncio.ensure_future(_ping(rank, i, latest, timeouts.ping_s, loading.is_local(i))) for i, rank in
             enumerate(ranks)]  # fmt: skip
    try:
        while True:
            for rank in halts.find():
                raise GangLost(f"the process of rank {rank} was stopped or died in its start")
            for rank in loading.find(latest):
                raise GangLost(f"rank {rank} has read nothing for {SILENT_LOAD_S:g} s while it loads")
            for ping in pings:
                if ping.done():
                    ping.result()
            await asyncio.sleep(PERIOD_S)
    finally:
        for ping in pings:
            ping.cancel()


async def _ping(rank: Any, i: int, latest: list[RankStatus], ping_s: float, is_local: bool) -> None:
    """Keep the status of one rank that starts. On this node its process tells more than its silence: it may import."""
    while True:
        try:
            latest[i] = await asyncio.wait_for(_status(rank), ping_s)
        except TimeoutError:
            if not is_local:
                raise GangLost(f"rank {i} does not answer for {ping_s:g} s while it starts") from None
        except RayTaskError:
            raise
        except RayError:
            return  # whoever assembles the ranks gets the same error, and says more
        await asyncio.sleep(4 * PERIOD_S)


class _Halts:
    """Finds ranks of this node whose process is stopped or dead."""

    def __init__(self, statuses: Sequence[RankStatus]) -> None:
        here = ray.get_runtime_context().get_node_id()
        self._local = [status for status in statuses if status.node_id == here]
        self._suspects: set[int] = set()

    def find(self) -> set[int]:
        """Those that are halted now and were so at the last call: a debugger may stop a process for a moment."""
        halted = {status.rank for status in self._local if is_halted(status.pid)}
        found, self._suspects = halted & self._suspects, halted
        return found


class _Loading:
    """Finds ranks of this node that load and do nothing, although they wait for no other.

    Before they read a transformer, ranks agree on its attention kernel. So a rank that has read as much as another, or
    more, may wait for it.
    """

    def __init__(self, statuses: Sequence[RankStatus]) -> None:
        here = ray.get_runtime_context().get_node_id()
        self._activities = {status.rank: Activity(status.pid) for status in statuses if status.node_id == here}
        self._grown = {status.rank: (status.loaded, time.monotonic()) for status in statuses}

    def is_local(self, rank: int) -> bool:
        """Whether its process can be seen from here; of the others, only what they say they have read."""
        return rank in self._activities

    def find(self, latest: Sequence[RankStatus]) -> list[int]:
        """Those that are hung.

        Args:
            latest: what each rank has said last.
        """
        for status in latest:
            if status.phase != "load" or status.loaded != self._grown[status.rank][0]:
                self._restart(status)
        idle = {status.rank: self._idle_s(status.rank) for status in latest if status.phase == "load"}
        least = min((latest[rank].loaded for rank, s in idle.items() if s <= SILENT_LOAD_S), default=math.inf)
        return [
            rank
            for rank, s in idle.items()
            if self.is_local(rank) and s > SILENT_LOAD_S and latest[rank].loaded < least
        ]

    def _restart(self, status: RankStatus) -> None:
        self._grown[status.rank] = status.loaded, time.monotonic()
        if self.is_local(status.rank):
            self._activities[status.rank].restart()

    def _idle_s(self, rank: int) -> float:
        if self.is_local(rank):
            return self._activities[rank].idle_s()
        return time.monotonic() - self._grown[rank][1]


async def _status(rank: Any) -> RankStatus:
    status: RankStatus = await rank.status.remote()
    return status
