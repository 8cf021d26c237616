"""A gang's own process that is stopped is ended by its guard, and the guard ends with it."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.gang import gang_guard

PROGRAM = """
import sys, time
from workers.gang.gang_guard import start_guard
guard = start_guard(0.02, 0.5)
print(guard.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def gang() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def guard_of(gang: subprocess.Popen[str]) -> int:
    assert gang.stdout is not None
    return int(gang.stdout.readline())


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


def test_a_stopped_gang_is_ended_and_one_that_runs_is_not(gang: subprocess.Popen[str]) -> None:
    guard = guard_of(gang)
    time.sleep(1)
    assert gang.poll() is None
    gang.send_signal(signal.SIGSTOP)
    assert gang.wait(timeout=30) == -signal.SIGKILL
    assert ends(guard)


def test_a_short_stop_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[tuple[list[object], list[object], list[object]]] = [([], [], [])] * 6 + [([0], [], [])]
    states, clock, killed = iter([False, True, True, False, True, True]), iter(range(0, 100, 3)), []
    monkeypatch.setattr(gang_guard.select, "select", lambda *_: looks.pop(0))
    monkeypatch.setattr(gang_guard, "is_stopped", lambda pid: next(states))
    monkeypatch.setattr(gang_guard.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(gang_guard.os, "kill", lambda *call: killed.append(call))
    gang_guard.look_after(1, 1.0, 7.0)
    assert killed == []
    assert not looks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_guard_ends_with_its_gang(gang: subprocess.Popen[str], number: signal.Signals) -> None:
    guard = guard_of(gang)
    gang.send_signal(number)
    gang.wait(timeout=30)
    assert ends(guard)
