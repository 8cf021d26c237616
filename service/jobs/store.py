"""The store of jobs. Every call is one transaction, which is on disk when the call returns.

Gateways submit, list and cancel; their runners claim, renew and publish, see `service.jobs.leases`.
`service.jobs.engines` opens the database; the calls are the same on both, and block. All of them raise
`JobsUnavailable` while the database is away.
"""

from collections.abc import Collection, Mapping, Sequence

import sqlalchemy as sa

from service.jobs import input_notes, outbox, queries
from service.jobs.leases import Leases
from service.jobs.records import (
    CANCELLED,
    HEAD_START_S,
    Counts,
    Delivery,
    Job,
    JobError,
    JobEvent,
    KeyReused,
    Kind,
    NewJob,
    Page,
    Priority,
    State,
)
from service.jobs.tables import jobs, to_job, to_row
from service.jobs.transitions import accepted, end, note


class JobStore(Leases):
    """All jobs of a deployment, in a database; the arguments are those of `Leases`."""

    def submit(self, new: NewJob) -> tuple[Job, bool]:
        """Add a job, unless it is there, or its idempotency key has brought it already.

        Returns:
            The job, and whether it is new.

        Raises:
            KeyReused: the key came with another body before.
        """
        with self._database.transaction() as (connection, now):
            found = queries.same(connection, new)
            if found is None:
                job = accepted(new, now)
                try:
                    with connection.begin_nested():
                        row = to_row(job, now + HEAD_START_S[new.priority])
                        connection.execute(sa.insert(jobs).values(**row))
                        note(connection, row, now, "")
                        input_notes.add_data(connection, job.id, new.input_data)
                    return job, True
                except sa.exc.IntegrityError:  # another gateway was faster with the same key
                    found = queries.same(connection, new)
                    if found is None:
                        raise
            return _the_same(new, found), found.id == new.id

    def known(self, new: NewJob) -> Job | None:
        """The job that its idempotency key has brought already; None: it is new.

        Raises:
            KeyReused: the key came with another body before.
        """
        with self._database.transaction() as (connection, _):
            found = queries.same(connection, new)
            return found and _the_same(new, found)

    def cancel(self, job_id: str, owner: str | None) -> Job:
        """End a job that has not ended. Its runner hears of it when it renews its lease.

        Raises:
            JobNotFound: the owner has no such job.
        """
        with self._database.transaction() as (connection, now):
            row = queries.find(connection, job_id, owner, lock=True)
            if to_job(row).ended:
                return to_job(row)
            return end(connection, row, now, self.keep_s, "cancelled", JobError(CANCELLED, "the job was cancelled"))

    def get(self, job_id: str, owner: str | None) -> Job:
        """A job.

        Args:
            job_id: of the job.
            owner: whose it must be; None: anybody's.

        Raises:
            JobNotFound: the owner has no such job.
        """
        with self._database.transaction() as (connection, _):
            return to_job(queries.find(connection, job_id, owner))

    def delete(self, job_id: str, owner: str | None) -> Job:
        """Forget a job, in whatever state. What it was is returned, so that its outputs can be removed.

        Raises:
            JobNotFound: the owner has no such job.
        """
        with self._database.transaction() as (connection, _):
            row = queries.find(connection, job_id, owner, lock=True)
            connection.execute(sa.delete(jobs).where(jobs.c.id == job_id))
            return to_job(row)

    def page(
        self,
        owner: str | None,
        kind: Kind | None = None,
        state: State | None = None,
        after: str | None = None,
        limit: int = 20,
        ascending: bool = False,
    ) -> Page:
        """Jobs by the time of their submission, the newest first.

        Args:
            owner: whose; None: everybody's.
            kind: only such; None: all.
            state: only such; None: all.
            after: id of the last job of the page before; it may have been deleted since.
            limit: of the page.
            ascending: the oldest first.
        """
        with self._database.transaction() as (connection, _):
            return queries.page(connection, owner, kind, state, after, limit, ascending)

    def events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        """What has happened to a job since the event with this number; nothing if there is no such job."""
        with self._database.transaction() as (connection, _):
            return queries.events_after(connection, job_id, after)

    def look(self, job_id: str, owner: str | None) -> tuple[Job, int]:
        """A job as `get` finds it, and its place among those that wait for its model: 1 for the next; 0: it does not.

        Raises:
            JobNotFound: the owner has no such job.
        """
        with self._database.transaction() as (connection, _):
            job = to_job(queries.find(connection, job_id, owner))
            return job, queries.position(connection, job) if job.state == "queued" else 0

    def counts(self) -> dict[str, Counts]:
        """By model, what has not ended. Models without such jobs are absent."""
        with self._database.transaction() as (connection, _):
            return queries.counts(connection)

    def ended(self) -> dict[tuple[str, State], int]:
        """By model and state, how many jobs have ended since the store was made, also those that are forgotten."""
        with self._database.transaction() as (connection, _):
            return queries.ended(connection)

    def disk(self) -> tuple[int, int] | None:
        """Bytes that are free, and in all, on the disk with the jobs; None: nobody knows, or it is a server's."""
        return self._database.disk()

    def ahead(self, model: str, priority: Priority) -> Counts:
        """What waits for a model and would come before a job of this priority that is submitted now."""
        with self._database.transaction() as (connection, now):
            return queries.ahead(connection, model, now + HEAD_START_S[priority])

    def note_inputs(self, job_id: str, names: Sequence[str]) -> None:
        """Note the files that a job will begin with, before they are written and before it is submitted."""
        with self._database.transaction() as (connection, now):
            input_notes.note(connection, job_id, names, now)

    def stray_inputs(self, after_s: float, most: int) -> list[str]:
        """Files that were noted at least so many seconds ago, and whose job is not there; at most so many."""
        with self._database.transaction() as (connection, now):
            return input_notes.stray(connection, now - after_s, most)

    def forget_inputs(self, names: Sequence[str]) -> None:
        """These files are gone."""
        with self._database.transaction() as (connection, _):
            input_notes.forget(connection, names)

    def input_data(self, job_id: str) -> Mapping[int, bytes]:
        """What a job begins with that lies in no files, by its place in the request. Without such a job: nothing."""
        with self._database.transaction() as (connection, _):
            return input_notes.data_of(connection, job_id)

    def due_webhooks(self, most: int, lease_s: float, room: Mapping[str, int] | None = None) -> list[Delivery]:
        """Take webhooks to send them; each counts as an attempt from now on.

        Args:
            most: at most so many.
            lease_s: seconds after which somebody else takes them, if nothing was said of them.
            room: by host, at most so many of its own; the first ones come first. Those of other hosts stay: another
                gateway may have them. None: of any host.
        """
        with self._database.transaction() as (connection, now):
            return outbox.due(connection, most, now, lease_s, room)

    def give_up_webhooks(self, hosts: Collection[str]) -> int:
        """Forget webhooks of other hosts than these that nobody has sent for `outbox.KEEP_S`; returns how many.

        Whoever may call the host gives them up itself, after one more attempt.
        """
        with self._database.transaction() as (connection, now):
            return outbox.give_up(connection, now, hosts)

    def webhook_sent(self, message_id: str) -> None:
        """A webhook has arrived; it is forgotten."""
        with self._database.transaction() as (connection, _):
            outbox.sent(connection, message_id)

    def webhook_not_sent(self, delivery: Delivery, after_s: float) -> bool:
        """A webhook has not arrived: it is taken again after so many seconds. False: it is too old, and given up."""
        with self._database.transaction() as (connection, now):
            return outbox.not_sent(connection, delivery, now, after_s)


def _the_same(new: NewJob, found: Job) -> Job:
    """The job that was found for a new one, if it was submitted as this one.

    Raises:
        KeyReused: it has the same key and another body.
    """
    if found.id != new.id and found.fingerprint != new.fingerprint:
        raise KeyReused(f"the idempotency key was sent with another body before; its job is {found.id}")
    return found
