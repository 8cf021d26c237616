"""What the faults of a run have cost: the ledger of the callers against the store, once nothing runs anymore."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from service.jobs.store import JobStore
from tests.benchmarks.job_faults.callers import Callers
from tests.benchmarks.job_faults.ledger import LEAST_FAULTS, Ledger

EXPECTED = ("request_quarantined",)
"""How a job may fail: faults have met it so often that it is not tried again."""

MOST_DRAWN_AGAIN = 60
"""Jobs that met a fault and are drawn once more, to compare their pictures."""


@dataclass
class Verdict:
    """Of one run.

    Attributes:
        accepted: jobs that callers were told of.
        states: how many have ended how, by state, and of those that failed by code.
        lost: ids of jobs that are unknown or have not ended, and why.
        twice: ids of jobs that were published more than once, or have several pictures.
        unknown: ids of jobs in the store by a key of which the ledger says another job.
        drawn_again: how many pictures of jobs that met a fault were compared with one drawn at leisure.
        different: ids of those that were not the same, byte for byte.
        refused: submissions that were refused for good.
        survived: ids of poisoned jobs that did not fail as quarantined.
        hasty: ids of jobs that failed so, but have met fewer faults than that takes.
    """

    accepted: int
    states: dict[str, int]
    lost: dict[str, str]
    twice: list[str]
    unknown: list[str]
    drawn_again: int
    different: list[str]
    refused: list[str]
    survived: list[str] = field(default_factory=list)
    hasty: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing went wrong."""
        failed = [name for name in self.states if name.startswith("failed") and not name.endswith(EXPECTED)]
        ended = all(name.startswith(("succeeded", "failed")) for name in self.states)
        wrong = (self.lost, self.twice, self.unknown, self.different, self.survived, self.hasty, failed)
        return ended and not any(wrong)


def compare_pictures(ledger: Ledger, callers: Callers) -> tuple[int, list[str]]:
    """Draw what met a fault once more, by a call that waits; how many were compared, and whose bytes differ."""
    met = [job for job in ledger.jobs.values() if job.struck and job.sha256][-MOST_DRAWN_AGAIN:]
    different, compared = [], 0
    for job in met:
        picture = callers.draw(job)
        if picture is None:
            continue
        compared += 1
        if hashlib.sha256(picture).hexdigest() != job.sha256:
            different.append(job.id)
    return compared, different


def judge(ledger: Ledger, store: JobStore, refused: list[str], compared: tuple[int, list[str]]) -> Verdict:
    """Compare what callers were told with what the store has."""
    lost = {job.id: job.trouble or f"still {job.state}" for job in ledger.jobs.values() if job.trouble or job.open}
    kept = store.page(None, limit=1_000_000).jobs
    known = {job.id: job for job in kept}
    for job in ledger.jobs.values():
        if job.id not in known:
            lost[job.id] = "not in the store"
        elif not known[job.id].ended:
            lost[job.id] = f"{known[job.id].state} in the store"
    by_key = {job.key: job.id for job in ledger.jobs.values()}
    twice = [job.id for job in kept if _publications(store, job.id) > 1 or len(job.outputs) > 1]
    unknown = [job.id for job in kept if by_key.get(job.idempotency_key or "", job.id) != job.id]
    poisoned = [job for job in ledger.jobs.values() if job.poisoned]
    survived = [job.id for job in poisoned if (job.state, job.code) != ("failed", *EXPECTED)]
    few = [job for job in ledger.jobs.values() if job.struck < LEAST_FAULTS and not (job.poisoned or job.inherited)]
    hasty = [job.id for job in few if (job.state, job.code) == ("failed", *EXPECTED)]
    ends = Counter(job.state if job.code is None else f"{job.state}: {job.code}" for job in ledger.jobs.values())
    return Verdict(len(ledger.jobs), dict(ends), lost, twice, unknown, *compared, refused, survived, hasty)


def _publications(store: JobStore, job_id: str) -> int:
    return sum(event.state == "succeeded" for event in store.events(job_id))
