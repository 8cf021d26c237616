"""What was accepted, and how it ended, as callers saw it: in memory, and as JSON lines that outlive the command.

A job is in the ledger from the moment at which its caller was told of it. So whatever happens later, a job of the
ledger that the cluster does not know, or that does not end, is lost.
"""

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENDED = frozenset({"succeeded", "failed", "cancelled", "expired"})

LEAST_FAULTS = 2
"""A job that has met fewer must not fail, unless it is poisoned."""


@dataclass
class Accepted:
    """One job, as its caller knows it.

    Attributes:
        id: that the cluster gave it.
        key: the idempotency key by which it was submitted.
        model, prompt, seed: what draws the same again.
        state: seen last.
        code: of the error of a job that failed.
        attempt: the last one.
        sha256: of the picture that was downloaded.
        struck: how many faults it has met before it ended.
        trouble: what its caller must never see; empty if all is well.
        until: when its caller had seen its end, by the clock of `time.monotonic`; 0: that waits still.
        inherited: it was accepted in a run that was interrupted.
        poisoned: whatever runs it dies, so it must fail as quarantined.
    """

    id: str
    key: str
    model: str
    prompt: str
    seed: int
    state: str = "queued"
    code: str | None = None
    attempt: int = 0
    sha256: str = ""
    struck: int = 0
    trouble: str = ""
    until: float = 0.0
    inherited: bool = False
    poisoned: bool = False

    @property
    def open(self) -> bool:
        """Whether its caller still waits for it."""
        return self.state not in ENDED and not self.trouble


class Ledger:
    """All jobs that were accepted.

    Args:
        file: of JSON lines; what is there already is read.
    """

    def __init__(self, file: Path) -> None:
        self._lock = threading.Lock()
        self.jobs: dict[str, Accepted] = {}
        for line in read_lines(file):
            self.jobs[line["id"]] = Accepted(**line | {"inherited": True})
        self._file = file.open("a")

    def write(self, job: Accepted) -> None:
        """Add a job that was accepted, or say what has become of it."""
        with self._lock:
            self.jobs[job.id] = job
            self._file.write(json.dumps(asdict(job)) + "\n")
            self._file.flush()

    def open_jobs(self) -> list[Accepted]:
        """Jobs whose callers still wait."""
        with self._lock:
            return [job for job in self.jobs.values() if job.open]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; one that was cut off by an interruption is left out."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
