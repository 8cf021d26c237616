"""What `spray serve` notices of the core of its cluster, without a cluster."""

import inspect
import threading
import time
from types import SimpleNamespace

import pytest
from ray._private import worker
from ray._private.node import Node

from service.rollout import core_watch, serve_client
from service.rollout.core_watch import CoreWatch, within
from workers.errors import GangLost


def test_a_dead_process_of_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    node = SimpleNamespace(dead_processes=lambda: [("log_monitor", None), ("raylet", None)])
    monkeypatch.setattr(worker, "_global_node", node)
    assert serve_client.dead_processes() == ["raylet"]
    assert CoreWatch().failure() == "Ray has ended: raylet died"
    monkeypatch.setattr(worker, "_global_node", None)
    assert CoreWatch().failure() == ""


def test_a_core_that_hangs_is_killed_so_that_the_end_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = threading.Event()
    node = SimpleNamespace(kill_all_processes=lambda check_alive, allow_graceful: killed.set())
    monkeypatch.setattr(worker, "_global_node", node)
    monkeypatch.setattr(serve_client, "ENDS_WITHIN_S", 0.05)
    monkeypatch.setattr(serve_client.ray, "shutdown", lambda: killed.wait(10))
    serve_client.disconnect()
    assert killed.is_set()
    killed.clear()
    monkeypatch.setattr(serve_client.ray, "shutdown", lambda: None)
    serve_client.disconnect()
    assert not killed.wait(0.2)  # a sound one is not


def test_how_a_core_is_killed_is_as_ray_has_it() -> None:
    parameters = inspect.signature(Node.kill_all_processes).parameters
    assert {"check_alive", "allow_graceful"} <= set(parameters)


@pytest.mark.parametrize("hangs", [True, False])
def test_a_silent_controller_is_noticed(monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    def status() -> None:
        if hangs:
            threading.Event().wait(2)
        raise RuntimeError("the controller is gone")

    monkeypatch.setattr(core_watch, "PERIOD_S", 0.01)
    monkeypatch.setattr(core_watch, "SILENT_S", 1.0)
    monkeypatch.setattr(core_watch.serve, "status", status)
    with CoreWatch() as watch:
        assert watch.failure() == ""
        time.sleep(1.2)
        assert watch.failure().startswith("Serve's controller has not answered for")


def test_a_controller_that_answers_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_watch, "PERIOD_S", 0.01)
    monkeypatch.setattr(core_watch, "SILENT_S", 2.0)  # a busy machine may stand still for a second
    monkeypatch.setattr(core_watch.serve, "status", lambda: None)
    with CoreWatch() as watch:
        time.sleep(2.2)
        assert watch.failure() == ""


def test_a_call_is_waited_for_so_long_and_no_longer() -> None:
    within(5, lambda: None, "nothing")
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0, "a mistake")
    with pytest.raises(TimeoutError, match=r"waiting did not end within 0\.05 s"):
        within(0.05, threading.Event().wait, "waiting")


def test_what_is_noticed_meanwhile_ends_the_wait() -> None:
    began, over = time.monotonic(), threading.Event()

    def notice() -> None:
        raise GangLost("the raylet died")

    with pytest.raises(GangLost, match="the raylet died"):
        within(30, lambda: over.wait(60), "asking", meanwhile=notice)
    assert time.monotonic() - began < 15
    over.set()
