"""Processes of ranks before they are watched, and that of their gang, which ranks guard."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.deployments import model
from workers.errors import GangLost
from workers.gang import gang_guard, rank_processes
from workers.gang.device import Place


class Process:
    """Says where it is; or nothing, as one that was stopped before it was heard of."""

    def __init__(self, stopped: bool) -> None:
        self.place = SimpleNamespace(remote=self._never if stopped else self._place)
        self.take_number = SimpleNamespace(remote=self._never)

    async def _place(self) -> Place:
        return Place("node", 1, "")

    async def _never(self, *_: Any) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("stopped", [(False, True), (False, False)], ids=["before its place", "before its number"])
def test_a_process_that_hangs_before_its_first_word_is_lost(
    monkeypatch: pytest.MonkeyPatch, stopped: tuple[bool, ...]
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(rank_processes, "FIRST_WORD_S", 0.05)
    monkeypatch.setattr(rank_processes.ray, "kill", killed.append)
    processes = [Process(each) for each in stopped]
    with pytest.raises(GangLost, match=r"has said nothing for 0\.05 s"):
        asyncio.run(asyncio.wait_for(rank_processes.assemble(processes, model(Path("/nowhere"))), 30))
    assert killed == processes


def test_a_gang_that_is_stopped_is_ended_and_one_that_runs_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang_guard, "PERIOD_S", 0.02)
    monkeypatch.setattr(gang_guard, "STOPPED_S", 0.2)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as gang:
        try:
            gang_guard.guard(gang.pid)
            time.sleep(0.5)
            assert gang.poll() is None
            gang.send_signal(signal.SIGSTOP)
            assert gang.wait(timeout=60) == -signal.SIGKILL
        finally:
            gang.kill()


def test_a_short_stop_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    states, killed = iter([False, True, True, False, True, False, None]), []
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(gang_guard, "is_stopped", lambda pid: next(states))
    monkeypatch.setattr(gang_guard.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(gang_guard.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(gang_guard.os, "kill", lambda *call: killed.append(call))
    gang_guard._look(1)
    assert killed == []
