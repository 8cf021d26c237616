"""The kinds of faults. Each does harm to a cluster at work, sees that the harm is real, and that it was noticed.

Only processes that carry the cluster's mark are struck, and the PostgreSQL server of the command's own. A process that
was killed must be gone, and another one in its place; whatever holds for a while must have been felt by a caller.
"""

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.job_faults.callers import Callers
from tests.benchmarks.job_faults.cluster import FAR, NEAR, Cluster, wait
from tests.benchmarks.job_faults.disk import Disk
from tests.support.postgres import Postgres

NOTICED_S = 120.0
"""A fault that nobody has noticed by then did no harm, and proves nothing."""

AT_WORK_S = 20.0
"""For jobs to be running before a fault."""

BURST = 12
"""Submissions in the middle of which the store is killed."""

WAITING = 6
"""Jobs that wait or run when the whole cluster is killed, at least."""

STORE_STOPPED_S = (6.0, 36.0)
"""Shorter and longer than a lease, and than a gateway waits for the store."""

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
        postgres: that keeps jobs; None: SQLite does.
        probe: the job that was submitted as soon as the harm was done.
        struck_at: when that was, by the clock of `time.monotonic`.
        met: the jobs that the fault has met.
    """

    cluster: Cluster
    callers: Callers
    rng: random.Random
    disk: Disk | None = None
    postgres: Postgres | None = None
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


def kill(scene: Scene, process: str, sign: signal.Signals = signal.SIGKILL) -> Facts:
    """Give one process of a kind a signal; another one must take its place."""
    scene.wait_at_work()
    pid, before = scene.one_of(process)
    facts = scene.meet()
    model = FAR if pid in scene.cluster.processes(FAR) and process in ("rank", "gang") else NEAR
    os.kill(pid, sign)
    scene.recover(model)
    return facts | _replaced(scene.cluster, process, pid, before)


def kill_store(scene: Scene) -> Facts:
    """Kill the store's process in the middle of submissions."""
    scene.wait_at_work()
    wanted, some = scene.rng.randint(1, BURST // 2), threading.Event()
    told: list[Any] = []

    def accepted(job: Any) -> None:
        told.append(job)
        if len(told) >= wanted:
            some.set()

    pid, before = scene.one_of("store")
    calls = scene.callers.burst(BURST, accepted)
    some.wait(NOTICED_S)
    facts = scene.meet()
    acknowledged = len(told)
    os.kill(pid, signal.SIGKILL)
    scene.recover()
    facts |= {"acknowledged": acknowledged, "in_submission": len(calls) - acknowledged}
    return facts | _replaced(scene.cluster, "store", pid, before)


def stop_rank(scene: Scene) -> Facts:
    """Stop a rank. It is not there anymore when it is noticed, for its gang kills it."""
    return kill(scene, "rank", signal.SIGSTOP)


def stop_store(scene: Scene) -> Facts:
    """Cut gateways and gangs off from the store: for a while, or until every lease has ended."""
    scene.wait_at_work()
    pid, _ = scene.one_of("store")
    facts = scene.meet()
    hold_s = scene.rng.choice(STORE_STOPPED_S)
    os.kill(pid, signal.SIGSTOP)
    try:
        asked = scene.callers.once(NEAR)
        time.sleep(hold_s)
        early = asked.result() if asked.done() else None
    finally:
        os.kill(pid, signal.SIGCONT)
    scene.recover()
    if early is not None and early.status_code != 503:
        raise NotNoticed(f"a submission was answered with {early.status_code} meanwhile")
    felt = "503" if early is not None else f"no answer for {hold_s:g} s"
    return facts | {"pid": pid, "held_s": hold_s, "felt": felt}


def fill_outputs(scene: Scene) -> Facts:
    """Fill the disk of outputs: submissions are refused with 507, and what runs finds no room for its picture."""
    assert scene.disk is not None
    scene.wait_at_work()
    facts = scene.meet()
    hold_s = scene.rng.uniform(2.0, 5.0)
    scene.disk.fill()
    try:
        answer = scene.callers.once(NEAR).result()
        time.sleep(hold_s)
    finally:
        scene.disk.free()
    scene.recover()
    if answer is None or answer.status_code != 507:
        raise NotNoticed(f"a submission was answered with {answer}")
    return facts | {"held_s": round(hold_s, 1), "felt": "507"}


def stop_database(scene: Scene) -> Facts:
    """Stop PostgreSQL and start it again: submissions are refused with 503 meanwhile."""
    assert scene.postgres is not None
    scene.wait_at_work()
    facts = scene.meet()
    hold_s = scene.rng.uniform(3.0, 10.0)
    scene.postgres.stop()
    try:
        answer = scene.callers.once(NEAR).result()
        time.sleep(hold_s)
    finally:
        scene.postgres.start()
    scene.recover()
    if answer is None or answer.status_code != 503 or "retry-after" not in answer.headers:
        raise NotNoticed(f"a submission was answered with {answer}")
    return facts | {"held_s": round(hold_s, 1), "felt": f"503, retry after {answer.headers['retry-after']} s"}


def lose_node(scene: Scene) -> Facts:
    """Kill the raylet of the second node, with which all that runs there ends, and start another node."""
    scene.wait_at_work()
    facts = scene.meet()
    before = scene.cluster.processes(FAR)
    pid, _ = scene.one_of("raylet", FAR)
    os.kill(pid, signal.SIGKILL)
    scene.recover(FAR)
    by_itself = scene.cluster.end_node(30.0)
    scene.cluster.start_node()
    new = wait(NOTICED_S, lambda: scene.cluster.find("rank", FAR))
    if not new:
        raise NotNoticed("no gang runs on the new node")
    return facts | {"pid": pid, "processes": len(before), "gone_by_itself": by_itself, "replaced_by": min(new)}


def restart(scene: Scene) -> Facts:
    """Kill every process of the cluster, with jobs that wait and run, and start it again."""
    scene.callers.burst(WAITING)
    wait(AT_WORK_S, lambda: len(scene.callers.ledger.open_jobs()) >= WAITING)
    scene.wait_at_work()
    facts = scene.meet()
    killed = scene.cluster.kill()
    scene.recover()
    scene.cluster.start()
    return facts | {"processes": len(killed)}


STRIKES: Mapping[str, Callable[[Scene], Facts]] = {
    "store": kill_store,
    "gateway": lambda scene: kill(scene, "gateway"),
    "rank": lambda scene: kill(scene, "rank"),
    "gang": lambda scene: kill(scene, "gang"),
    "controller": lambda scene: kill(scene, "controller"),
    "proxy": lambda scene: kill(scene, "proxy"),
    "node": lose_node,
    "rank stopped": stop_rank,
    "store stopped": stop_store,
    "outputs full": fill_outputs,
    "cluster": restart,
    "database": stop_database,
}
"""By the name of the kind."""


def plan(seed: int, kinds: list[str], count: int) -> list[str]:
    """The kinds of the first so many faults: in each round every kind once, in an order of its own."""
    rng, planned = random.Random(seed), list[str]()
    for _ in range(math.ceil(count / len(kinds))):
        planned += rng.sample(kinds, len(kinds))
    return planned[:count]


def _replaced(cluster: Cluster, process: str, pid: int, before: set[int]) -> Facts:
    """What was struck and what has taken its place."""
    began = time.monotonic()
    new = wait(NOTICED_S, lambda: pid not in cluster.processes() and cluster.find(process) - before)
    if not new:
        raise NotNoticed(f"{process} {pid} is not replaced after {NOTICED_S:g} s")
    return {"pid": pid, "replaced_by": min(new), "replaced_s": round(time.monotonic() - began, 1)}
