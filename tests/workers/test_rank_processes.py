"""Processes of ranks before they are watched, and that of their gang, which ranks guard."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.deployments import model
from workers.errors import GangLost
from workers.gang import rank_processes
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
        asyncio.run(asyncio.wait_for(rank_processes.assemble(processes, model(Path("/nowhere")), "0"), 30))
    assert killed == processes
