"""Whether an actor is seen to live."""

import pytest
import ray

from workers.gang.caller import is_alive


def test_where_ray_does_not_run_nobody_is_gone_and_ray_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: pytest.fail("this starts Ray"))
    assert is_alive("somebody")


def test_the_name_of_an_actor_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_actor(name: str, namespace: str) -> object:
        if name == "away":
            raise ConnectionError("the head is away")
        if name == "gone":
            raise ValueError("there is none")
        return object()

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_actor", get_actor)
    assert [is_alive(name) for name in ("there", "away", "gone")] == [True, True, False]
