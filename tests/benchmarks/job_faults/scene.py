"""A cluster at work, and what every fault does with it. For `strikes` and what it is made of."""

import random
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.job_faults.callers import Callers
from tests.benchmarks.job_faults.cluster import NEAR, Cluster, wait
from tests.benchmarks.job_faults.disk import Disk
from tests.benchmarks.job_faults.link import Link
from tests.support.postgres import Postgres

NOTICED_S = 120.0
"""A fault that nobody has noticed by then did no harm, and proves nothing."""

AT_WORK_S = 20.0
"""For jobs to be running before a fault."""

WAITING = 6
"""Jobs that wait or run before a fault that concerns those, at least."""

Facts = dict[str, Any]


class NotNoticed(Exception):
    """A fault had no effect."""


@dataclass
class Scene:
    """A cluster at work, and what a fault needs of it.

    Attributes:
        cluster: that is struck.
        callers: who submit jobs to it meanwhile.
        rng: decides all that is left to chance.
        disk: of outputs; None: that of the machine.
        store_disk: of the store's file; likewise.
        postgres: that keeps jobs; None: SQLite does.
        link: by which gateways reach it.
        probe: the job that was submitted as soon as the harm was done.
        struck_at: when that was, by the clock of `time.monotonic`.
        met: the jobs that the fault has met.
    """

    cluster: Cluster
    callers: Callers
    rng: random.Random
    disk: Disk | None = None
    store_disk: Disk | None = None
    postgres: Postgres | None = None
    link: Link | None = None
    probe: "Future[float] | None" = None
    struck_at: float = 0.0
    met: list[Any] = field(default_factory=list)

    def wait_at_work(self) -> None:
        """Return when a job runs, or after `AT_WORK_S`."""
        wait(AT_WORK_S, lambda: any(job.state == "running" for job in self.callers.ledger.open_jobs()))

    def meet(self) -> Facts:
        """Note which jobs a fault meets, just before it."""
        self.met = self.callers.ledger.open_jobs()
        for job in self.met:
            job.struck += 1
        return {"met": len(self.met), "met_running": sum(job.state == "running" for job in self.met)}

    def one_of(self, process: str, node: str = "") -> tuple[int, set[int]]:
        """One process of a kind, and all of them.

        Raises:
            NotNoticed: there is none.
        """
        found = wait(NOTICED_S, lambda: self.cluster.find(process, node))
        if not found:
            raise NotNoticed(f"there is no {process} to strike")
        return self.rng.choice(sorted(found)), found

    def recover(self, model: str = NEAR) -> None:
        """The harm is done: submit the job whose end says that the cluster serves again."""
        self.struck_at, self.probe = time.monotonic(), self.callers.probe(model)


def replaced(cluster: Cluster, process: str, pid: int, before: set[int]) -> Facts:
    """What was struck and what has taken its place."""
    began = time.monotonic()
    new = wait(NOTICED_S, lambda: pid not in cluster.processes() and cluster.find(process) - before)
    if not new:
        raise NotNoticed(f"{process} {pid} is not replaced after {NOTICED_S:g} s")
    return {"pid": pid, "replaced_by": min(new), "replaced_s": round(time.monotonic() - began, 1)}
