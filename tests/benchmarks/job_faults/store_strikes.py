"""Faults of the store of jobs: it dies, hangs, has no room, or cannot be reached. For `strikes`."""

import os
import signal
import sqlite3
import threading
import time
from contextlib import closing
from typing import Any

import httpx

from service.jobs.engines import open_postgres
from service.jobs.runner import LEASE_S
from service.jobs.store import JobStore
from service.jobs.store_actor import FILE
from tests.benchmarks.job_faults.cluster import NEAR, wait
from tests.benchmarks.job_faults.scene import NOTICED_S, WAITING, Facts, NotNoticed, Scene, replaced

BURST = 12
"""Submissions in the middle of which the store is killed."""

STORE_STOPPED_S = (6.0, 36.0)
"""Shorter and longer than a lease, and than a gateway waits for the store."""

CUT_OFF_S = 6.0
"""A gateway extends each lease at least every five seconds. One that is older is that of a gateway which cannot."""

TRIES = 4
"""To find a gateway that runs a job."""


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
    return facts | replaced(scene.cluster, "store", pid, before)


def stop_store(scene: Scene) -> Facts:
    """Cut gateways and gangs off from the store: for a while, or until every lease has ended."""
    scene.wait_at_work()
    pid, _ = scene.one_of("store")
    facts = scene.meet()
    hold_s = scene.rng.choice(STORE_STOPPED_S)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        asked = scene.callers.once(NEAR)
        scene.hold(hold_s)
        early = asked.result() if asked.done() else None
        felt = "no answer" if early is None else str(early.status_code)
    finally:
        os.kill(pid, signal.SIGCONT)
        scene.recover()
    if early is not None and early.status_code < 500:  # 500 and more: another fault may have met it
        raise NotNoticed(f"a submission was answered with {early.status_code} meanwhile")
    return facts | {"pid": pid, "held_s": round(scene.struck_at - began, 1), "felt": felt}


def fill_store(scene: Scene) -> Facts:
    """Fill the disk of the store: as soon as its file cannot grow, submissions are refused with 503."""
    assert scene.store_disk is not None
    scene.wait_at_work()
    # Else its log has room for minutes: a large store writes over old pages of it.
    with closing(sqlite3.connect(scene.cluster.store / FILE, timeout=NOTICED_S)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    facts = scene.meet()
    scene.store_disk.fill()
    began = time.monotonic()
    try:  # some are accepted, by what it has written since then
        answer, accepted = scene.refused(503, "jobs_unavailable", accepts=True)
        scene.hold(scene.rng.uniform(2.0, 5.0))
    finally:
        scene.store_disk.free()
        scene.recover()
    return facts | {"held_s": round(scene.struck_at - began, 1), "accepted_before": accepted} | _felt(answer)


def stop_database(scene: Scene) -> Facts:
    """Stop PostgreSQL and start it again: submissions are refused with 503 meanwhile."""
    assert scene.postgres is not None
    scene.wait_at_work()
    facts = scene.meet()
    scene.postgres.stop()
    began = time.monotonic()
    try:
        answer, _ = scene.refused(503, "jobs_unavailable")
        scene.hold(scene.rng.uniform(3.0, 10.0))
    finally:
        scene.postgres.start()
        scene.recover()
    return facts | {"held_s": round(scene.struck_at - began, 1)} | _felt(answer)


def cut_off(scene: Scene) -> Facts:
    """Cut one gateway off from PostgreSQL while its gangs draw, until others have taken its jobs over.

    What it has drawn then comes too late, and all that it has sent to the store arrives when the cut is healed.
    """
    assert scene.link is not None and scene.postgres is not None
    link, store = scene.link, JobStore(open_postgres(scene.postgres.url), 3600.0)
    idle: set[int] = set()
    try:
        for _ in range(TRIES):
            scene.callers.burst(WAITING)
            scene.wait_at_work()
            if not wait(NOTICED_S, lambda: not _without_word(store)):
                raise NotNoticed("jobs have no runner before the cut, and would be taken for those of the cut one")
            pid, _ = scene.one_of("gateway", rather_not=idle)
            facts = scene.meet()
            link.cut(pid)
            cut_at = time.monotonic()
            held = wait(2 * CUT_OFF_S, lambda: _without_word(store))
            if held:
                break
            link.heal()  # it ran nothing
            idle.add(pid)
        else:
            raise NotNoticed(f"none of {TRIES} gateways ran a job")
        over = wait(NOTICED_S, lambda: all(_taken_over(store, job_id, runner) for job_id, runner in held.items()))
        scene.hold(scene.rng.uniform(0.0, 5.0))  # before the others have drawn it, or after
    finally:
        link.heal()
        scene.recover()
        store.close()
    if not over:
        raise NotNoticed(f"{', '.join(held)} were not taken over")
    held_s = round(scene.struck_at - cut_at, 1)
    return facts | {"pid": pid, "held_s": held_s, "taken_over": list(held), "messages_late": link.held}


def _felt(answer: httpx.Response) -> Facts:
    """How a submission was refused.

    Raises:
        NotNoticed: its caller does not hear when to come again.
    """
    if "retry-after" not in answer.headers:
        raise NotNoticed(f"a submission was answered with {answer}, without Retry-After")
    return {"felt": f"{answer.status_code}, retry after {answer.headers['retry-after']} s"}


def _without_word(store: JobStore) -> dict[str, str]:
    """Jobs that run, and whose lease was not extended lately; by whom they are run."""
    late = time.time() + LEASE_S - CUT_OFF_S
    running = store.page(None, state="running", limit=1000).jobs
    return {job.id: job.runner for job in running if job.lease_until is not None and job.lease_until < late}


def _taken_over(store: JobStore, job_id: str, runner: str) -> bool:
    job = store.get(job_id, None)
    return job.runner != runner or job.ended
