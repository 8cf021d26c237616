"""What the gang sees of its ranks' processes: those that are halted, and those that load and do nothing."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError

from deploy.model_sections import Timeouts
from workers.errors import GangLost
from workers.gang import process_state, watch
from workers.gang.process_state import Activity, is_halted
from workers.gang.watch import Watch, watch_start
from workers.messages import Phase, RankStatus

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")

PATIENCE_S = 60.0

SLEEPS = "import time; print(flush=True); time.sleep(600)"
READS = "import time; print(flush=True)\nwhile True: open('/dev/zero', 'rb').read(1 << 20); time.sleep(0.05)"


@pytest.fixture
def started() -> Iterator[Any]:
    """Starts a Python process that says a line first."""
    processes: list[subprocess.Popen[str]] = []

    def start(code: str) -> int:
        processes.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout is not None
        processes[-1].stdout.readline()
        return processes[-1].pid

    yield start
    for process in processes:
        process.kill()
        process.wait()


def status(rank: int, pid: int, phase: Phase) -> RankStatus:
    return RankStatus(rank, pid, "here", phase, 0, "m", 0.0, 0)


class FakeRank:
    """Answers with its status, or never."""

    def __init__(self, said: RankStatus, silent: bool = False) -> None:
        self.said, self.status, self.silent, self.calls = said, self, silent, 0

    async def remote(self) -> RankStatus:
        self.calls += 1
        if self.silent:
            await asyncio.Event().wait()
        return self.said


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr("workers.gang.watch.ray.get_runtime_context", lambda: context)
    monkeypatch.setattr(watch, "PERIOD_S", 0.02)


def reason_of(*ranks: FakeRank, within_s: float = PATIENCE_S, ping_s: float = 600.0) -> str:
    """Why ranks that start are lost; empty if they are not."""

    async def look() -> str:
        watching = watch_start(ranks, [rank.said for rank in ranks], Timeouts(ping_s=ping_s))
        try:
            await asyncio.wait_for(watching, within_s)
        except GangLost as error:
            return str(error)
        except TimeoutError:
            return ""
        raise AssertionError("it watches until it is canceled")

    return asyncio.run(look())


def test_a_rank_that_is_stopped_while_it_loads_is_noticed_at_once(started: Any) -> None:
    sound, stopped = started(READS), started(SLEEPS)
    os.kill(stopped, signal.SIGSTOP)
    ranks = [FakeRank(status(0, sound, "load")), FakeRank(status(1, stopped, "starting"), silent=True)]
    assert reason_of(*ranks) == "the process of rank 1 was stopped or died in its start"


def test_why_a_rank_that_starts_has_died_is_said_by_who_assembles_them() -> None:
    class Killed(FakeRank):
        async def remote(self) -> RankStatus:
            raise OutOfMemoryError("its node was low on memory")

    assert reason_of(Killed(status(0, os.getpid(), "starting")), within_s=0.5) == ""


def test_a_rank_that_loads_and_reads_nothing_is_hung(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENT_LOAD_S", 1.0)
    reads, sleeps = started(READS), started(SLEEPS)
    assert reason_of(FakeRank(status(0, reads, "load")), within_s=3) == ""
    assert reason_of(FakeRank(status(0, sleeps, "starting")), within_s=3) == "", "it may wait for its peers"
    assert reason_of(FakeRank(status(0, sleeps, "load"))) == "rank 0 has read nothing for 1 s while it loads"
    hung = [FakeRank(replace(status(0, reads, "load"), loaded=0.5)), FakeRank(status(1, sleeps, "load"))]
    assert reason_of(*hung) == "rank 1 has read nothing for 1 s while it loads"


def test_a_rank_that_has_read_more_than_another_may_wait_for_it(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They agree on an attention kernel before each transformer: the fastest reader waits for the slowest."""
    monkeypatch.setattr(watch, "SILENT_LOAD_S", 1.0)
    reads, waits = started(READS), started(SLEEPS)
    slow = FakeRank(status(0, reads, "load"))
    assert reason_of(slow, FakeRank(replace(status(1, waits, "load"), loaded=0.5)), within_s=3) == ""
    assert reason_of(slow, FakeRank(status(1, waits, "load")), within_s=3) == "", "the first tries the kernels"

    class Reads(FakeRank):
        async def remote(self) -> RankStatus:
            self.said = replace(self.said, loaded=self.said.loaded + 0.01)
            return self.said

    far = Reads(replace(status(0, reads, "load"), node_id="elsewhere"))
    assert reason_of(far, FakeRank(replace(status(1, waits, "load"), loaded=0.5)), within_s=3) == ""
    stops = FakeRank(far.said)
    assert "rank 1 has read" in reason_of(stops, FakeRank(replace(status(1, waits, "load"), loaded=0.5)))


def test_a_silent_rank_elsewhere_is_lost_one_here_may_import(started: Any) -> None:
    pid = started(SLEEPS)
    elsewhere = replace(status(0, pid, "starting"), node_id="elsewhere")
    assert "rank 0 does not answer for 0.1 s" in reason_of(FakeRank(elsewhere, silent=True), ping_s=0.1)
    assert reason_of(FakeRank(status(0, pid, "starting"), silent=True), ping_s=0.1, within_s=1) == ""


def test_what_a_process_does_is_seen_from_outside(started: Any) -> None:
    sleeps, reads = Activity(started(SLEEPS)), Activity(started(READS))
    time.sleep(1)
    assert sleeps.idle_s() >= 1
    assert reads.idle_s() < 1
    assert not is_halted(os.getpid())
    assert is_halted(2**22 + 1)


def test_a_process_that_waits_for_a_slow_file_is_not_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(process_state, "PROC", tmp_path)
    monkeypatch.setattr(process_state, "time", SimpleNamespace(monotonic=lambda: now[0]))
    reader, ended = tmp_path / "7/task/8", tmp_path / "7/task/9"
    for thread in (reader, ended):
        thread.mkdir(parents=True)
    (tmp_path / "7/stat").write_text("7 (ray::Rank (0)) S" + " 0" * 40)
    (tmp_path / "7/io").write_text("rchar: 5\nread_bytes: 5\n")
    activity = Activity(7)
    for state, idle_s in (("D", 0.0), ("S", 60.0), ("S", 120.0), ("D", 0.0)):
        now[0] += 60
        (reader / "stat").write_text(f"8 (python) {state}" + " 0" * 40)
        assert activity.idle_s() == idle_s


def test_ranks_that_wait_are_asked_seldom_and_those_that_work_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "IDLE_S", 600.0)
    rank = FakeRank(status(0, os.getpid(), "idle"))

    async def story() -> None:
        watching = Watch([rank], [rank.said], Timeouts(), lose=lambda *_: None)
        running = asyncio.ensure_future(watching.run())
        await asyncio.sleep(0.3)
        assert rank.calls == 1
        with watching.working():
            async with asyncio.timeout(PATIENCE_S):
                while rank.calls < 4:  # although the rank has not yet said that it works
                    await asyncio.sleep(0.01)
            rank.said = replace(rank.said, phase="denoise")
            async with asyncio.timeout(PATIENCE_S):
                while watching.statuses[0].phase != "denoise":
                    await asyncio.sleep(0.01)
        before = rank.calls
        async with asyncio.timeout(PATIENCE_S):
            while rank.calls < before + 3:  # although there is nothing to do anymore, as far as is known
                await asyncio.sleep(0.01)
        watching.stop()
        await running

    asyncio.run(story())


def test_a_rank_that_is_left_is_looked_at_no_more(started: Any) -> None:
    ranks = [FakeRank(status(0, os.getpid(), "idle")), FakeRank(status(1, started(SLEEPS), "denoise"))]
    lost: list[int] = []

    async def story() -> None:
        def lose(_kind: Any, _reason: str, rank: int) -> None:
            lost.append(rank)
            watching.leave([rank])

        watching = Watch(ranks, [rank.said for rank in ranks], Timeouts(), lose)
        running = asyncio.ensure_future(watching.run())
        os.kill(ranks[1].said.pid, signal.SIGSTOP)
        with watching.working():
            async with asyncio.timeout(PATIENCE_S):
                while not lost:
                    await asyncio.sleep(0.01)
            asked, before = ranks[1].calls, ranks[0].calls
            async with asyncio.timeout(PATIENCE_S):
                while ranks[0].calls < before + 4:
                    await asyncio.sleep(0.01)
        assert lost == [1] and ranks[1].calls <= asked + 1
        watching.stop()
        await running

    asyncio.run(story())
