"""Which stopped processes a local cluster ends, on real processes."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from service.rollout.stopped_processes import STOPPED_S, StoppedProcesses
from tests.support.deployments import wait_for

Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that has the title of one of Ray's."""
    started: list[subprocess.Popen[bytes]] = []

    def start(title: str) -> subprocess.Popen[bytes]:
        sleeps = [title, "-c", "import time; time.sleep(600)"]
        started.append(subprocess.Popen(sleeps, executable=sys.executable))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    wait_for(psutil.Process(process.pid).status, lambda status: status == psutil.STATUS_STOPPED)


@pytest.mark.parametrize(
    "title", ["ray::ServeReplica:model-a:Gang", "ray::ServeController", "ray::ProxyActor", "/ray/raylet/raylet"]
)
def test_a_process_that_is_stopped_for_long_is_ended(start: Start, title: str) -> None:
    stopped, runs, foreign = start(title), start(title), start("ray::IDLE")
    stop(stopped)
    stop(foreign)  # whoever waits for it looks after it
    watch = StoppedProcesses()
    watch.look(0.0)
    watch.look(STOPPED_S)
    assert stopped.poll() is None, "it has not been stopped for long"
    watch.look(STOPPED_S + 0.1)
    assert stopped.wait(60) == -signal.SIGKILL
    assert runs.poll() is None
    assert foreign.poll() is None


def test_one_that_goes_on_in_time_is_not(start: Start) -> None:
    process, watch = start("ray::ServeController"), StoppedProcesses()
    for now in (0.0, STOPPED_S + 0.1):
        stop(process)
        watch.look(now)
        process.send_signal(signal.SIGCONT)
        wait_for(psutil.Process(process.pid).status, lambda status: status != psutil.STATUS_STOPPED)
        watch.look(now + 0.1)
    assert process.poll() is None
