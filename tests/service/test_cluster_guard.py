"""What a guard leaves of a cluster whose first process has ended, on real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.rollout.cluster_guard import start_guard

SLEEPS = "import time; print('up', flush=True); time.sleep(600)"
ENDS = "import time; print('up', flush=True); time.sleep(0.3)"
STARTS_A_GUARD = """
import pathlib, sys
from service.rollout.cluster_guard import start_guard
folder = pathlib.Path(sys.argv[1])
guard = start_guard(folder, folder / "metrics")
print(guard.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def started() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(started: ExitStack, code: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    process = started.enter_context(
        subprocess.Popen([sys.executable, "-c", code, *arguments], env=os.environ | environment, stdout=subprocess.PIPE)
    )
    started.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (folder := tmp_path / "spray-1").mkdir()
    (folder / "log").touch()
    return folder


def test_what_is_left_of_the_cluster_is_ended_and_nothing_else(started: ExitStack, folder: Path) -> None:
    ours, other = str(folder / "metrics"), str(folder.parent / "spray-2" / "metrics")
    worker = start(started, SLEEPS, SPRAY_METRICS_DIR=ours, RAY_RAYLET_PID="1")
    stopped = start(started, SLEEPS, SPRAY_METRICS_DIR=ours, RAY_RAYLET_PID="1")
    stopped.send_signal(signal.SIGSTOP)
    core = start(started, SLEEPS, f"--temp-dir={folder}/ray", SPRAY_METRICS_DIR=ours)
    neighbor = start(started, SLEEPS, SPRAY_METRICS_DIR=other, RAY_RAYLET_PID="1")
    child = start(started, SLEEPS, SPRAY_METRICS_DIR=ours)  # of the process that has started the cluster
    guard = start_guard(folder, Path(ours), grace_s=0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        guard.wait(1.0)
    assert worker.poll() is None, "the cluster is at work"
    guard.communicate(timeout=30)
    assert [process.wait(30) for process in (worker, stopped, core)] == [-signal.SIGKILL] * 3
    assert [process.poll() for process in (neighbor, child)] == [None, None]
    assert not folder.exists()


def test_who_ends_in_time_is_not_killed(started: ExitStack, folder: Path) -> None:
    ends = start(started, ENDS, SPRAY_METRICS_DIR=str(folder / "metrics"), RAY_RAYLET_PID="1")
    start_guard(folder, folder / "metrics", grace_s=30).communicate(timeout=60)
    assert ends.wait(30) == 0


def test_it_begins_when_its_process_is_killed(started: ExitStack, folder: Path) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTS_A_GUARD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    started.enter_context(starter)
    assert starter.stdout is not None
    guard = int(starter.stdout.readline())
    worker = start(started, SLEEPS, SPRAY_METRICS_DIR=str(folder / "metrics"), RAY_RAYLET_PID="1")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guard, number)  # as a terminal does to all that it has started
    starter.kill()
    assert worker.wait(30) == -signal.SIGKILL
