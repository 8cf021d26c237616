"""Processes of ranks before they have said anything."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError

from tests.support.deployments import model
from workers.errors import GangLost
from workers.gang import rank_processes, watch
from workers.gang.device import Place


class Process:
    """Says where it is; or nothing, as one that was stopped before it was heard of."""

    def __init__(self, stopped: bool, where: tuple[str, int] | None = None) -> None:
        self.where = where
        self.place = SimpleNamespace(remote=self._never if stopped else self._place)
        self.take_number = SimpleNamespace(remote=self._never)

    async def _place(self) -> Place:
        return Place("node", 1, "")

    async def _never(self, *_: Any) -> None:
        await asyncio.Event().wait()


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Ray was told to kill. Of a process, Ray knows its `where`."""
    killed: list[Any] = []
    monkeypatch.setattr(rank_processes.ray, "kill", killed.append)
    monkeypatch.setattr(rank_processes.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    for module in (rank_processes, watch):
        monkeypatch.setattr(module, "process_of", lambda process: process.where)
    monkeypatch.setattr(watch, "CREATION_PERIOD_S", 0.02)
    return killed


def assemble(*processes: Process) -> None:
    asyncio.run(asyncio.wait_for(rank_processes.assemble(processes, model(Path("/nowhere")), "0"), 30))


@pytest.mark.parametrize("stopped", [(False, True), (False, False)], ids=["before its place", "before its number"])
def test_a_process_that_hangs_before_its_first_word_is_lost(
    monkeypatch: pytest.MonkeyPatch, killed: list[Any], stopped: tuple[bool, ...]
) -> None:
    monkeypatch.setattr(rank_processes, "FIRST_WORD_S", 0.05)
    processes = [Process(each) for each in stopped]
    with pytest.raises(GangLost, match=r"has said nothing for 0\.05 s"):
        assemble(*processes)
    assert killed == processes


def test_a_process_that_is_stopped_before_its_first_word_is_lost_at_once(killed: list[Any]) -> None:
    stopped = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        os.kill(stopped.pid, signal.SIGSTOP)
        elsewhere = Process(stopped=True, where=("elsewhere", stopped.pid))
        with pytest.raises(GangLost, match=f"process, {stopped.pid}, was stopped or died before it had said anything"):
            assemble(elsewhere, Process(stopped=True, where=("here", stopped.pid)))
        assert stopped.wait(30) == -signal.SIGKILL
        assert killed == [elsewhere]
    finally:
        stopped.kill()
        stopped.wait()


def test_a_rank_that_ray_kills_for_memory_while_it_starts_is_lost() -> None:
    class Killed(Process):
        async def _place(self) -> Place:
            raise OutOfMemoryError("its node was low on memory")

    with pytest.raises(GangLost, match="a rank died while it started: its node was low on memory"):
        assemble(Killed(stopped=False))
