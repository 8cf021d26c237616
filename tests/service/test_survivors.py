"""Which processes a local cluster ends when its core has ended, on real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.rollout import survivors
from service.rollout.survivors import end_survivors


@pytest.fixture
def started() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(started: ExitStack, code: str, **environment: str) -> subprocess.Popen[bytes]:
    process = started.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | environment,
            cwd=environment["SPRAY_METRICS_DIR"],
            stdout=subprocess.PIPE,
        )
    )
    started.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


SLEEPS = "import time; print('up', flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPS
ENDS = "import pathlib, time; print('up', flush=True); time.sleep(0.3); pathlib.Path('ended').touch()"


def test_workers_of_this_cluster_are_ended_and_no_others(started: ExitStack, tmp_path: Path) -> None:
    ours, other = str(tmp_path / "ours"), str(tmp_path / "other")
    for folder in (ours, other):
        Path(folder).mkdir()
    deaf = start(started, DEAF, SPRAY_METRICS_DIR=ours, RAY_RAYLET_PID="1")
    stopped = start(started, SLEEPS, SPRAY_METRICS_DIR=ours, RAY_RAYLET_PID="1")
    stopped.send_signal(signal.SIGSTOP)
    neighbor = start(started, SLEEPS, SPRAY_METRICS_DIR=other, RAY_RAYLET_PID="1")
    child = start(started, SLEEPS, SPRAY_METRICS_DIR=ours)  # of the process that has started the cluster
    end_survivors(Path(ours))
    assert [process.poll() is not None for process in (deaf, stopped)] == [True, True]
    assert [process.poll() for process in (neighbor, child)] == [None, None]


def test_who_ends_by_itself_is_left_alone(started: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survivors, "GRACE_S", 30.0)
    ends = start(started, ENDS, SPRAY_METRICS_DIR=str(tmp_path), RAY_RAYLET_PID="1")
    end_survivors(tmp_path)
    assert ends.poll() is not None
    assert (tmp_path / "ended").exists()
