"""A cluster at work, and what every fault does with it. For `strikes` and what it is made of."""

import random
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.benchmarks.job_faults.callers import Callers
from tests.benchmarks.job_faults.cluster import NEAR, Cluster, wait
from tests.benchmarks.job_faults.disk import Disk
from tests.benchmarks.job_faults.link import Link
from tests.support.postgres import Postgres

NOTICED_S = 120.0
"""A fault that nobody has noticed by then did no harm, and proves nothing."""

AT_WORK_S = 20.0
"""For jobs to be running before a fault."""

LOOK_S = 0.3
"""Between two submissions of somebody who wants to be refused."""

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
        meanwhile: another fault, which strikes while this one holds; None: it is alone.
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
    meanwhile: Callable[[], None] | None = None
    probe: "Future[float] | None" = None
    struck_at: float = 0.0
    met: list[Any] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        """Whether all jobs that the fault has met have ended."""
        return all(job.until for job in self.met)

    @property
    def settled_s(self) -> float:
        """How long after the harm the last one of them ended."""
        return round(max(0.0, *(job.until - self.struck_at for job in self.met)), 1) if self.met else 0.0

    def wait_at_work(self) -> None:
        """Return when a job runs, or after `AT_WORK_S`."""
        wait(AT_WORK_S, lambda: any(job.state == "running" for job in self.callers.ledger.open_jobs()))

    def meet(self) -> Facts:
        """Note which jobs a fault meets, just before it."""
        self.met = self.callers.ledger.open_jobs()
        for job in self.met:
            job.struck += 1
        return {"met": len(self.met), "met_running": sum(job.state == "running" for job in self.met)}

    def one_of(self, process: str, node: str = "", rather_not: Collection[int] = ()) -> tuple[int, set[int]]:
        """One process of a kind, and all of them.

        Args:
            process: the kind.
            node: where it is; empty: anywhere.
            rather_not: taken only if there are no others.

        Raises:
            NotNoticed: there is none.
        """
        found = wait(NOTICED_S, lambda: self.cluster.find(process, node))
        if not found:
            raise NotNoticed(f"there is no {process} to strike")
        return self.rng.choice(sorted(found.difference(rather_not) or found)), found

    def refused(self, status: int, code: str, accepts: bool = False) -> tuple[httpx.Response, int]:
        """Submit until somebody is refused so: other refusals are those of what another fault has just met.

        Args:
            status: of the answer.
            code: of its error.
            accepts: submissions may be accepted before.

        Returns:
            The answer, and how many were accepted before.

        Raises:
            NotNoticed: a submission is accepted, or nobody is refused so within `NOTICED_S`.
        """
        accepted, until = 0, time.monotonic() + NOTICED_S
        while True:
            answer = self.callers.once(NEAR, follow=False).result()
            if answer is not None and (answer.status_code, _code(answer)) == (status, code):
                return answer, accepted
            taken = answer is not None and answer.status_code == 202
            accepted += taken
            if (taken and not accepts) or time.monotonic() > until:
                raise NotNoticed(f"{accepted} submissions were accepted, the last one was answered with {answer}")
            if not taken:
                time.sleep(LOOK_S)

    def hold(self, seconds: float) -> None:
        """Let the harm last so long, and until what strikes meanwhile is noticed."""
        until = time.monotonic() + seconds
        if self.meanwhile is not None:
            self.meanwhile()
        time.sleep(max(0.0, until - time.monotonic()))

    def recover(self, model: str = NEAR) -> None:
        """The harm is done: submit the job whose end says that the cluster serves again."""
        met = {job.id for job in self.met}
        for job in self.callers.ledger.open_jobs():  # accepted since
            if job.id not in met:
                job.struck += 1
                self.met.append(job)
        self.struck_at, self.probe = time.monotonic(), self.callers.probe(model)


def _code(answer: httpx.Response) -> str:
    """The code of an error; empty: it has none, as what a proxy says by itself."""
    try:
        return str(answer.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""


def replaced(cluster: Cluster, process: str, pid: int, before: set[int]) -> Facts:
    """What was struck and what has taken its place."""
    began = time.monotonic()
    new = wait(NOTICED_S, lambda: pid not in cluster.processes() and cluster.find(process) - before)
    if not new:
        raise NotNoticed(f"{process} {pid} is not replaced after {NOTICED_S:g} s")
    return {"pid": pid, "replaced_by": min(new), "replaced_s": round(time.monotonic() - began, 1)}
