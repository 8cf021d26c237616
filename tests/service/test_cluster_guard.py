"""What a guard leaves of a cluster whose first process has ended, on real processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.rollout import cluster_guard
from service.rollout.cluster_guard import end_guard, start_guard
from tests.support.deployments import wait_for

SLEEPS = "import time; time.sleep(600)"
STARTS_A_GUARD = """
import pathlib, sys
from service.rollout.cluster_guard import start_guard
print(start_guard(pathlib.Path(sys.argv[1])).pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def started() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(
    started: ExitStack, folder: Path, code: str = SLEEPS, file: str = "raylet.out", mode: str = "ab"
) -> subprocess.Popen[bytes]:
    """A process with an open file below a folder, besides its own outputs: those of Ray's agents are pipes."""
    (logs := folder / "ray" / "logs").mkdir(parents=True, exist_ok=True)
    (logs / file).touch()
    with (logs / file).open(mode) as log:
        process = started.enter_context(subprocess.Popen([sys.executable, "-c", code], pass_fds=[log.fileno()]))
    started.callback(process.kill)
    return process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (folder := tmp_path / "spray-1").mkdir()
    return folder


def ignores(pid: int, sign: signal.Signals) -> bool:
    """Whether a process ignores a signal, as the system knows it."""
    (ignored,) = re.findall(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(ignored, 16) >> (sign - 1) & 1)


def test_what_is_left_of_the_cluster_is_ended_and_nothing_else(started: ExitStack, folder: Path) -> None:
    started.enter_context((folder / "monitor.out").open("w"))  # as the starter has for a moment
    worker, stopped = start(started, folder), start(started, folder)
    stopped.send_signal(signal.SIGSTOP)
    neighbor, reader = start(started, folder.with_name("spray-12")), start(started, folder, mode="rb")
    driver = start(started, folder, file="python-core-driver-1.log")  # as `spray deploy` has
    guard = start_guard(folder, grace_s=0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        guard.wait(1.0)
    assert worker.poll() is None, "the cluster is at work"
    guard.communicate(timeout=30)
    assert [process.wait(30) for process in (worker, stopped)] == [-signal.SIGKILL] * 2
    assert [process.poll() for process in (neighbor, reader, driver)] == [None] * 3
    assert not folder.exists()


def test_who_ends_in_time_is_not_killed(started: ExitStack, folder: Path) -> None:
    ends = start(started, folder, "import time; time.sleep(1)")
    start_guard(folder, grace_s=30).communicate(timeout=60)
    assert ends.wait(30) == 0
    assert not folder.exists()


def test_it_begins_when_its_process_is_killed(started: ExitStack, folder: Path) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTS_A_GUARD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    started.enter_context(starter)
    assert starter.stdout is not None
    guard = int(starter.stdout.readline())
    worker = start(started, folder)
    wait_for(lambda: ignores(guard, signal.SIGHUP), bool)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guard, number)  # as systemd does to all that it has started
    starter.kill()
    assert worker.wait(30) == -signal.SIGKILL


def test_nobody_waits_for_a_guard_that_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_guard, "ENDS_WITHIN_S", 0.5)
    guard = start_guard(folder)
    guard.send_signal(signal.SIGSTOP)
    end_guard(guard)
    assert guard.returncode == -signal.SIGKILL


def test_what_writes_to_files_that_were_removed_is_found(started: ExitStack, folder: Path) -> None:
    """The next local cluster removes the folder of one whose process was killed."""
    worker = start(started, folder)
    shutil.rmtree(folder)
    assert list(cluster_guard.processes(folder)) == [worker.pid]
