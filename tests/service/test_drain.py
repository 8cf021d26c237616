"""How long a node that ends waits for what serves there. `tests/live/test_drain.py` has Ray's and Serve's part."""

import re
import socket
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from service.rollout import drain as module
from service.rollout.drain import drain

SERVES = "ray::ServeReplica:gateway:Gateway"


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_announce", lambda raylet, seconds: True)
    monkeypatch.setattr(module, "PERIOD_S", 0.05)


@pytest.fixture
def head() -> Iterator[str]:
    """The address of one that answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def node(request: pytest.FixtureRequest, head: str) -> Iterator[psutil.Process]:
    """A node's process, with a child that serves for so long."""
    seconds, address, *title = request.param
    line = f"bash -c 'exec -a {(title or [SERVES])[0]} sleep {seconds}' & bash -c 'exec -a ray::IDLE sleep 60' & wait"
    flags = ["--node_id=a", f"--gcs-address={address or head}"]
    process = subprocess.Popen(["bash", "-c", line, *flags], start_new_session=True)
    node = psutil.Process(process.pid)
    while not any(module._serving(node)):
        time.sleep(0.01)
    yield node
    for each in (*node.children(recursive=True), node):
        each.kill()
    process.wait()


@pytest.mark.parametrize("node", [("0.5", "")], indirect=True)
def test_it_ends_with_what_serves(node: psutil.Process) -> None:
    began = time.monotonic()
    assert drain(node, 60)
    assert time.monotonic() - began < 30  # the other child goes on


@pytest.mark.parametrize("node", [("60", ""), ("60", "", "ray::RankActor")], indirect=True)
def test_it_ends_in_time(node: psutil.Process, caplog: pytest.LogCaptureFixture) -> None:
    assert not drain(node, 0.3)
    assert re.search(f"the node ends with ({SERVES}|ray::RankActor)", caplog.text)


@pytest.mark.parametrize("node", [("60", "127.0.0.1:1")], indirect=True)
def test_it_ends_with_the_cluster(node: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody moves anything when the head is gone for good."""
    monkeypatch.setattr(module, "WITHOUT_HEAD_S", 0.3)
    began = time.monotonic()
    assert not drain(node, 600)
    assert time.monotonic() - began < 60
