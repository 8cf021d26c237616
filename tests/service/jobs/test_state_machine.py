"""Random lives of many jobs, on both databases, beside a model of them in plain Python."""

import dataclasses
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from service.jobs.records import HEAD_START_S, Job, JobError, LeaseLost, Priority
from service.jobs.store import JobStore
from tests.service.jobs.stores import BROKEN, FILM, KEEP_S, LEASE_S, Clock, new_job, open_engine
from workers.errors import JobNotFound

ENDED = ("succeeded", "failed", "cancelled", "expired")
MODELS = ("film", "draw")
PRIORITIES: tuple[Priority, ...] = ("interactive", "standard", "batch")


@dataclasses.dataclass
class Known:
    """What the model believes of a job."""

    order: tuple[float, str]
    model: str
    owner: str
    deadline_at: float | None
    state: str = "queued"
    fence: int = 0
    attempt: int = 0
    gang_losses: int = 0
    lease_until: float = 0.0
    not_before: float = 0.0
    expires_at: float = 0.0
    published: int = 0


class Lives(RuleBasedStateMachine):
    """Its store comes from `open`, set by the test."""

    open: Callable[[Clock], JobStore]

    held = Bundle("held")
    """Ids and fences of attempts, old ones too."""

    ids = Bundle("ids")

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.store = type(self).open(self.clock)
        self.known: dict[str, Known] = {}
        self.ended: Counter[tuple[str, str]] = Counter()
        self.number = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()

    @rule(
        target=ids,
        model=st.sampled_from(MODELS),
        owner=st.sampled_from(("ann", "bob")),
        priority=st.sampled_from(PRIORITIES),
        deadline_s=st.sampled_from((None, None, 40.0, 200.0)),
        after_s=st.sampled_from((0.001, 20.0)),
    )
    def submit(self, model: str, owner: str, priority: Priority, deadline_s: float | None, after_s: float) -> str:
        self.number += 1  # ids sort by submission, as those of different milliseconds do
        given = {"id": f"job_{self.number:04}", "priority": priority, "deadline_s": deadline_s}
        job, fresh = self.store.submit(new_job(model, owner, **given))
        assert fresh and job.state == "queued"
        deadline_at = None if deadline_s is None else self.clock.now + deadline_s
        self.known[job.id] = Known((self.clock.now + HEAD_START_S[priority], job.id), model, owner, deadline_at)
        self.clock.now += after_s
        return job.id

    @rule(seconds=st.sampled_from((1.0, LEASE_S, 2 * LEASE_S, 700.0, KEEP_S)))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(target=held, room=st.dictionaries(st.sampled_from(MODELS), st.integers(0, 6)))
    def claim(self, room: dict[str, int]) -> Any:
        taken = self.store.claim(room, "r", LEASE_S)
        self._settle()
        for model, allowed in room.items():
            running = sum(job.model == model and job.state == "running" for job in self.known.values())
            most = max(0, allowed - running)
            ready = [job for job in self.known.values() if job.model == model and job.state == "queued"]
            ready = sorted((job for job in ready if job.not_before <= self.clock.now), key=lambda job: job.order)
            assert [job.id for job in taken if job.model == model] == [job.order[1] for job in ready[:most]]
        for job in taken:
            known = self.known[job.id]
            known.state, known.lease_until = "running", self.clock.now + LEASE_S
            known.fence, known.attempt = known.fence + 1, known.attempt + 1
            assert (job.fence, job.attempt, job.gang_losses) == (known.fence, known.attempt, known.gang_losses)
        return multiple(*((job.id, job.fence) for job in taken))

    @rule(attempt=held)
    def renew(self, attempt: tuple[str, int]) -> None:
        known = self._do(attempt, lambda: self.store.renew(*attempt, LEASE_S, 1, 8))
        if known:
            known.lease_until = self.clock.now + LEASE_S

    @rule(attempt=held)
    def publish(self, attempt: tuple[str, int]) -> None:
        done = self.known.get(attempt[0])
        if done is not None and done.state == "succeeded" and done.fence == attempt[1]:
            assert self.store.publish(*attempt, [], {}).outputs == (FILM,)  # the answer of the first was lost
            return
        known = self._do(attempt, lambda: self.store.publish(*attempt, [FILM], {}))
        if known:
            known.published += 1
            self._end(known, "succeeded")

    @rule(attempt=held, error=st.sampled_from((BROKEN, JobError("deadline_exceeded", "late"))))
    def fail(self, attempt: tuple[str, int], error: JobError) -> None:
        known = self._do(attempt, lambda: self.store.fail(*attempt, error))
        if known:
            self._end(known, "failed" if error is BROKEN else "expired")

    @rule(attempt=held, after_s=st.sampled_from((0.0, 50.0)))
    def give_back(self, attempt: tuple[str, int], after_s: float) -> None:
        known = self._do(attempt, lambda: self.store.give_back(*attempt, "stops", after_s))
        if known:
            known.state, known.attempt, known.not_before = "queued", known.attempt - 1, self.clock.now + after_s

    @rule(attempt=held)
    def try_again(self, attempt: tuple[str, int]) -> None:
        known = self._do(attempt, lambda: self.store.try_again(*attempt, BROKEN))
        if known and known.attempt == 3:
            self._end(known, "failed")
        elif known:
            known.state, known.not_before = "queued", self.clock.now

    @rule(attempt=held)
    def lose_gang(self, attempt: tuple[str, int]) -> None:
        known = self._do(attempt, lambda: self.store.lose_gang(*attempt, self._losses(attempt) + 1, "gone"))
        if known:
            known.gang_losses += 1
            if known.gang_losses == 2:
                self._end(known, "failed")

    @rule(job_id=ids, owner=st.sampled_from(("ann", "bob", None)))
    def cancel(self, job_id: str, owner: str | None) -> None:
        known = self.known.get(job_id)
        if known is None or owner not in (None, known.owner):
            with pytest.raises(JobNotFound):
                self.store.cancel(job_id, owner)
            return
        self.store.cancel(job_id, owner)
        if known.state not in ENDED:
            self._end(known, "cancelled")

    @rule(job_id=ids)
    def delete(self, job_id: str) -> None:
        if self.known.pop(job_id, None) is None:
            with pytest.raises(JobNotFound):
                self.store.delete(job_id, None)
        else:
            self.store.delete(job_id, None)

    @rule()
    def sweep(self) -> None:
        self.store.sweep()
        self._settle()
        gone = [job_id for job_id, job in self.known.items() if job.state in ENDED and job.expires_at <= self.clock.now]
        for job_id in gone:
            del self.known[job_id]

    @rule(after=ids, limit=st.integers(1, 3), ascending=st.booleans(), owner=st.sampled_from(("ann", None)))
    def page(self, after: str, limit: int, ascending: bool, owner: str | None) -> None:
        ids = sorted((i for i, job in self.known.items() if owner in (None, job.owner)), reverse=not ascending)
        ids = [i for i in ids if (i > after if ascending else i < after)]
        found = self.store.page(owner, after=after, limit=limit, ascending=ascending)
        assert ([job.id for job in found.jobs], found.has_more) == (ids[:limit], len(ids) > limit)

    @invariant()
    def all_is_as_it_is_known(self) -> None:
        if not hasattr(self, "store"):
            return
        found = {job.id: job for job in self.store.page(None, limit=1000).jobs}
        assert found.keys() == self.known.keys()
        for job_id, known in self.known.items():
            self._compare(found[job_id], known)
        counts = self.store.counts()
        for model in MODELS:
            states = [job.state for job in self.known.values() if job.model == model]
            counted = (counts[model].queued, counts[model].running) if model in counts else (0, 0)
            assert counted == (states.count("queued"), states.count("running"))
        assert self.store.ended() == self.ended  # also of those that are deleted or swept

    def _compare(self, job: Job, known: Known) -> None:
        assert (job.state, job.fence, job.attempt, job.gang_losses) == (
            known.state,
            known.fence,
            known.attempt,
            known.gang_losses,
        )
        assert len(job.outputs) == known.published <= 1
        assert (job.lease_until or 0.0) == (known.lease_until if known.state == "running" else 0.0)
        assert (job.expires_at or 0.0) == known.expires_at
        assert (job.error is None) == (job.state in ("queued", "running", "succeeded"))

    def _losses(self, attempt: tuple[str, int]) -> int:
        return self.known[attempt[0]].gang_losses if attempt[0] in self.known else 0

    def _do(self, attempt: tuple[str, int], call: Callable[[], Any]) -> Known | None:
        """Call as an attempt; return the job if the attempt still has it."""
        job_id, fence = attempt
        known = self.known.get(job_id)
        if known is not None and known.state == "running" and known.fence == fence:
            call()
            return known
        with pytest.raises(LeaseLost):
            call()
        return None

    def _end(self, known: Known, state: str) -> None:
        known.state, known.expires_at = state, self.clock.now + KEEP_S
        self.ended[known.model, state] += 1

    def _settle(self) -> None:
        now = self.clock.now
        for known in self.known.values():
            late = known.deadline_at is not None and known.deadline_at <= now
            silent = known.state == "running" and known.lease_until <= now
            if late and (known.state == "queued" or silent):
                self._end(known, "expired")
            elif silent and known.attempt == 3:
                self._end(known, "failed")
            elif silent:
                known.state = "queued"


def live(open_it: Callable[[Clock], JobStore], lives: int) -> None:
    machine = type("Machine", (Lives,), {"open": staticmethod(open_it)})
    machine.TestCase.settings = settings(
        max_examples=lives,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    machine.TestCase().runTest()


def test_on_sqlite() -> None:
    folder = Path(tempfile.mkdtemp())
    live(lambda clock: JobStore(open_engine("sqlite", folder, ""), KEEP_S, clock, patience_s=0.0), 15)
    shutil.rmtree(folder)


def test_on_postgres(postgres: Any) -> None:
    engine = open_engine("postgres", Path(), postgres.url)

    def empty(clock: Clock) -> JobStore:
        with engine.begin() as connection:
            connection.exec_driver_sql("TRUNCATE jobs, job_ends CASCADE")
        return JobStore(engine, KEEP_S, clock, patience_s=0.0)

    live(empty, 6)
