"""One fault of each kind at a served cluster of two nodes with jobs under way: every job that was accepted ends once.

For `make fault FULL=1`: the first round of `make soak`, see `tests.benchmarks.job_faults`. The stops of all that keeps
jobs are in `test_job_faults.py`. Prints the seconds until each fault was over.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from tests.benchmarks.job_faults.__main__ import OWN_DISK
from tests.benchmarks.job_faults.cluster import ROOT
from tests.benchmarks.job_faults.disk import INSIDE
from tests.benchmarks.job_faults.ledger import read_lines
from tests.benchmarks.job_faults.verdict import Verdict
from tests.support.processes import hear_signals
from tests.support.when import IN_FULL

LIMIT_S = 900.0
"""For all of them on a busy machine; a quiet one takes six minutes. Then no more of them strike."""

END_S = 330.0
"""For the rest of its jobs, each of which has five minutes."""

pytestmark = [IN_FULL, pytest.mark.timeout(LIMIT_S + END_S + 60)]

FELT = {"outputs full": "507", "store full": "503, retry after"}
"""What a submission was answered with meanwhile."""

KINDS = ("store", "gateway", "rank", "gang", "controller", "proxy", "node", *FELT, "poisoned")


@dataclass
class Struck:
    """What a run has written.

    Attributes:
        code: the exit code of the command.
        said: what it has printed.
        lines: one for each fault, and the last one for the run.
    """

    code: int
    said: str
    lines: list[dict[str, Any]]


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Struck:
    """One run, on one cluster."""
    folder = tmp_path_factory.mktemp("strikes")
    said = folder / "said"
    with said.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.job_faults", "--faults", str(len(KINDS)), "--together", "0",
             "--folder", str(folder / "run"), "--kinds", *KINDS],
            env={name: value for name, value in os.environ.items() if name != INSIDE}, cwd=ROOT, stdout=file,
            stderr=subprocess.STDOUT, preexec_fn=hear_signals,
        )  # fmt: skip
    try:
        wait(run, LIMIT_S)
        if run.poll() is None:
            run.send_signal(signal.SIGTERM)  # it strikes no more, and judges what there was
            wait(run, END_S)
    finally:
        if run.poll() is None:
            run.send_signal(signal.SIGTERM)  # it stops its cluster
            run.wait(120)
    return Struck(run.returncode, said.read_text(), read_lines(folder / "run" / "faults.jsonl"))


def wait(run: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Wait for its end, no longer than this."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(seconds)


def left_out(struck: Struck, kind: str) -> bool:
    """Whether this machine cannot have faults of this kind."""
    return kind in OWN_DISK and "are left out" in struck.said


@pytest.mark.parametrize("kind", KINDS)
def test_jobs_outlive_it(struck: Struck, kind: str) -> None:
    """It has met jobs, was noticed, and the cluster served again; who was to feel it, did."""
    if left_out(struck, kind):
        pytest.skip("this user may not mount a disk in a namespace")
    found = [line for line in struck.lines if line.get("kind") == kind]
    assert found, f"it never struck: {struck.said[-2000:]}"
    (fault,) = found
    print(f" {kind}: served after {fault.get('served_s')} s;", end="")
    assert "trouble" not in fault, fault
    assert fault["met"] > 0, fault
    assert math.isfinite(fault["served_s"])
    assert fault.get("felt", "").startswith(FELT.get(kind, "")), fault


def test_nothing_was_lost_and_nothing_published_twice(struck: Struck) -> None:
    verdict = Verdict(**struck.lines[-1])
    print(f" {verdict.accepted} accepted: {verdict.states};", end="")
    assert struck.code == 0, struck.said[-2000:]
    assert (verdict.lost, verdict.twice, verdict.different, verdict.survived, verdict.hasty) == ({}, [], [], [], [])
    assert verdict.sound, verdict
    assert verdict.drawn_again > 0
    assert verdict.accepted >= len(KINDS)
