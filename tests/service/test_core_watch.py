"""What `spray serve` notices of the core of its cluster, without a cluster."""

import threading
import time
from types import SimpleNamespace

import pytest
from ray._private import worker

from service.rollout import core_watch, serve_client
from service.rollout.core_watch import CoreWatch, within


def test_a_dead_process_of_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    node = SimpleNamespace(dead_processes=lambda: [("log_monitor", None), ("raylet", None)])
    monkeypatch.setattr(worker, "_global_node", node)
    assert serve_client.dead_processes() == ["raylet"]
    assert CoreWatch().failure() == "Ray has ended: raylet died"
    monkeypatch.setattr(worker, "_global_node", None)
    assert CoreWatch().failure() == ""


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
    monkeypatch.setattr(core_watch, "SILENT_S", 1.0)
    monkeypatch.setattr(core_watch.serve, "status", lambda: None)
    with CoreWatch() as watch:
        time.sleep(1.2)
        assert watch.failure() == ""


def test_a_call_is_waited_for_so_long_and_no_longer() -> None:
    within(5, lambda: None, "nothing")
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0, "a mistake")
    with pytest.raises(TimeoutError, match=r"waiting did not end within 0\.05 s"):
        within(0.05, threading.Event().wait, "waiting")
