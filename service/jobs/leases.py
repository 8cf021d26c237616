"""What runners do with jobs: take them, keep them by lease, end them. Half of the store, see `service.jobs.store`.

What a runner changes, it changes under its fence: a job that was cancelled, deleted or given to another attempt raises
`LeaseLost`.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from service.jobs import queries
from service.jobs.database import PATIENCE_S, Database, one_claims
from service.jobs.records import (
    CANCELLED,
    DEADLINE,
    MAX_ATTEMPTS,
    MAX_GANG_LOSSES,
    QUARANTINED,
    Job,
    JobError,
    JobOutput,
    LeaseLost,
    State,
)
from service.jobs.tables import Row, jobs, to_job
from service.jobs.transitions import change, end, end_unserved, is_served, queue_again

ENDS_AS: Mapping[str, State] = {DEADLINE: "expired", CANCELLED: "cancelled"}
"""By the code of its error, how a job has ended that has not failed."""

FORGOTTEN_AT_ONCE = 1000
"""Expired jobs that one transaction removes, so that none is long, whatever has gathered while no gateway ran."""


class Leases:
    """Jobs in a database, as their runners see them.

    Args:
        engine: from `open_sqlite` or `open_postgres`.
        keep_s: how long ended jobs are kept, in seconds; may be changed.
        clock: seconds since the epoch; None: PostgreSQL's own clock, or that of this process.
        patience_s: see `service.jobs.database`.
    """

    def __init__(
        self,
        engine: sa.Engine,
        keep_s: float,
        clock: Callable[[], float] | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.keep_s = keep_s
        self._database = Database(engine, clock, patience_s)

    def claim(self, room: Mapping[str, int], runner: str, lease_s: float, strangers: Collection[str] = ()) -> list[Job]:
        """Take jobs to run them; each counts as an attempt from now on.

        Args:
            room: by model, how many may run at once, whoever runs them but strangers; of two gateways that claim at the
                same moment the second one counts what the first one took.
            runner: who takes them.
            lease_s: seconds after which they are queued again if `renew` is not called.
            strangers: runners of other clusters, which have room of their own.
        """
        taken = []
        with self._database.transaction() as (connection, now):
            one_claims(connection)
            self._database.settle(connection, now, self.keep_s)
            for model in sorted(room):
                free = room[model] - queries.running(connection, model, strangers)
                for row in queries.next_in_line(connection, model, free, now):
                    values = {"fence": row["fence"] + 1, "attempt": row["attempt"] + 1, "runner": runner}
                    values |= {"lease_until": now + lease_s, "started_at": now, "step": 0, "total_steps": 0}
                    taken.append(change(connection, row, now, state="running", **values))
        return taken

    def renew(self, job_id: str, fence: int, lease_s: float, step: int, total_steps: int) -> Job:
        """Extend a lease, and say how far the job is.

        Raises:
            LeaseLost: it is not this runner's anymore.
        """
        progress = {"step": step, "total_steps": total_steps}
        with self._database.transaction() as (connection, now):
            query = sa.update(jobs).where(*queries.held(job_id, fence)).values(lease_until=now + lease_s, **progress)
            row = connection.execute(query.returning(jobs)).mappings().one_or_none()
            if row is None:
                raise LeaseLost(job_id)
            return to_job(row)

    def publish(
        self,
        job_id: str,
        fence: int,
        outputs: Sequence[JobOutput],
        metrics: Mapping[str, Any],
        warnings: Sequence[str] = (),
        steps: int = 0,
    ) -> Job:
        """End a job with its result. Doing it again changes nothing.

        Args:
            job_id: of the job.
            fence: of the attempt.
            outputs: its files.
            metrics: what it took.
            warnings: what its caller should know.
            steps: denoising steps that it took.

        Raises:
            LeaseLost: it is not this runner's anymore. The outputs are nobody's.
        """
        made: dict[str, Any] = {"outputs": [asdict(output) for output in outputs], "metrics": dict(metrics)}
        with self._held(job_id, fence, or_done=True) as (connection, row, now):
            if row["state"] == "succeeded":
                return to_job(row)
            made |= {
                "warnings": list(warnings),
                "error": None,
                "step": steps,
                "total_steps": steps,
                "keep_s": self.keep_s,
            }
            return change(connection, row, now, state="succeeded", **made)

    def fail(self, job_id: str, fence: int, error: JobError) -> Job:
        """End a job that would fail again; one that failed for its deadline is expired, one whose request was cancelled
        by another call is cancelled.

        Raises:
            LeaseLost: it is not this runner's anymore.
        """
        with self._held(job_id, fence) as (connection, row, now):
            return end(connection, row, now, self.keep_s, ENDS_AS.get(error.code, "failed"), error)

    def give_back(self, job_id: str, fence: int, reason: str, after_s: float = 0.0) -> Job:
        """Queue a job again that could not be begun, or whose runner has to stop. The attempt does not count.

        Args:
            job_id: of the job.
            fence: of the attempt.
            reason: for its events.
            after_s: seconds in which nobody takes it.

        Raises:
            LeaseLost: it is not this runner's anymore.
        """
        with self._held(job_id, fence) as (connection, row, now):
            return queue_again(connection, row, now, reason, attempt=row["attempt"] - 1, not_before=now + after_s)

    def try_again(self, job_id: str, fence: int, error: JobError, after_s: float = 0.0) -> Job:
        """Queue a job again whose attempt failed for a reason that may pass; the last attempt ends it.

        Raises:
            LeaseLost: it is not this runner's anymore.
        """
        with self._held(job_id, fence) as (connection, row, now):
            if row["attempt"] >= MAX_ATTEMPTS:
                return end(connection, row, now, self.keep_s, "failed", error)
            return queue_again(connection, row, now, error.message, not_before=now + after_s)

    def lose_gang(self, job_id: str, fence: int, lost: int, reason: str) -> Job:
        """Count a gang that the job has cost. It runs on, or fails if it has cost as many as it may.

        Args:
            job_id: of the job.
            fence: of the attempt.
            lost: how many gangs it has cost by now.
            reason: what became of the last one.

        Raises:
            LeaseLost: it is not this runner's anymore.
        """
        with self._held(job_id, fence) as (connection, row, now):
            if lost < MAX_GANG_LOSSES:
                return change(connection, row, now, reason, state="running", gang_losses=lost, step=0)
            said = f"the job has cost {lost} gangs, and is not tried again; the last one: {reason}"
            return end(connection, row, now, self.keep_s, "failed", JobError(QUARANTINED, said), gang_losses=lost)

    def runners(self) -> list[str]:
        """Who runs jobs."""
        with self._database.transaction() as (connection, _):
            return queries.runners(connection)

    def disown(self, runner: str, held: Collection[str]) -> None:
        """Queue again what a runner has claimed and does not know of: the answer was lost.

        Args:
            runner: who asks; an empty name is that of several.
            held: the jobs that it runs.
        """
        if not runner:
            return
        with self._database.transaction() as (connection, now):
            unheld = jobs.c.state == "running", jobs.c.runner == runner, jobs.c.id.not_in(held)
            for row in connection.execute(sa.select(jobs).where(*unheld).with_for_update()).mappings().all():
                begun = row["total_steps"] > 0  # else this is no attempt yet
                attempt = row["attempt"] if begun else row["attempt"] - 1
                queue_again(connection, row, now, "its runner does not know of it", attempt=attempt)

    def end_leases(self, runner: str) -> None:
        """A runner is gone: its jobs are queued again by the next `sweep`."""
        with self._database.transaction() as (connection, now):
            of_runner = jobs.c.state == "running", jobs.c.runner == runner
            connection.execute(sa.update(jobs).where(*of_runner).values(lease_until=now))

    def sweep(self) -> None:
        """Settle what nobody claims, and forget ended jobs that have expired. Somebody calls it every few seconds."""
        with self._database.transaction() as (connection, now):
            self._database.settle(connection, now, self.keep_s)
            expired = sa.select(jobs.c.id).where(jobs.c.expires_at <= now).limit(FORGOTTEN_AT_ONCE)
            ids = connection.execute(expired.with_for_update(skip_locked=True)).scalars().all()
            connection.execute(sa.delete(jobs).where(jobs.c.id.in_(ids)))

    def end_unserved(self, model: str, after_s: float) -> int:
        """End jobs that have waited for so long for a model that the caller's deployment does not have.

        Args:
            model: its name.
            after_s: seconds for which each of them has waited at least. Nothing ends if a job of the model runs, or
                was begun since: another cluster has it then.

        Returns:
            How many have ended. There may be more.
        """
        with self._database.transaction() as (connection, now):
            return end_unserved(connection, model, now, self.keep_s, after_s)

    def rename_model(self, former: str, model: str, unless_begun_s: float = 0.0) -> int:
        """Let the jobs that wait for a model wait for another one: the same under a new name.

        Args:
            former: the name under which they were accepted.
            model: its name now.
            unless_begun_s: nothing changes if a job of the former name runs, or was begun in so many seconds: another
                cluster has a model of that name. 0: no cluster shares the store.

        Returns:
            How many were renamed.
        """
        with self._database.transaction() as (connection, now):
            if unless_begun_s and is_served(connection, former, now, unless_begun_s):
                return 0
            waiting = jobs.c.state == "queued", jobs.c.model == former
            return connection.execute(sa.update(jobs).where(*waiting).values(model=model)).rowcount

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    @contextlib.contextmanager
    def _held(self, job_id: str, fence: int, or_done: bool = False) -> Iterator[tuple[sa.Connection, Row, float]]:
        """The row of a job, locked, in a transaction.

        Args:
            job_id: of the job.
            fence: of the attempt that must run it.
            or_done: or has ended it with success.

        Raises:
            LeaseLost: no attempt with this fence runs it.
        """
        with self._database.transaction() as (connection, now):
            query = sa.select(jobs).where(*queries.held(job_id, fence, or_done)).with_for_update()
            row = connection.execute(query).mappings().one_or_none()
            if row is None:
                raise LeaseLost(job_id)
            yield connection, row, now
