"""How long jobs wait for a model that cannot be started."""

from types import SimpleNamespace
from typing import Any

import pytest

from service.jobs import patience as module
from service.jobs.patience import UNSERVED_S, Patience


class Tries:
    """Jobs of one model that are tried at a time of the test's own."""

    def __init__(self) -> None:
        self.now, self.patience = 1000.0, Patience()

    def job(self, id: str, waited_s: float) -> Any:
        return SimpleNamespace(id=id, model="film", created_at=0.0, started_at=waited_s)

    def fails(self, id: str, waited_s: float) -> bool:
        """Whether a job that cannot be begun now waits on."""
        return self.patience.waits_on(self.job(id, waited_s))


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> Tries:
    made = Tries()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def fail_for(tries: Tries, seconds: float) -> None:
    """One job is tried every ten seconds."""
    for _ in range(int(seconds / 10)):
        assert tries.fails("first", 0.0)
        tries.now += 10


def test_a_job_waits_as_long_as_it_is_tried_in_vain(tries: Tries) -> None:
    fail_for(tries, UNSERVED_S)
    assert not tries.fails("first", 0.0)


def test_those_behind_it_have_waited_as_well(tries: Tries) -> None:
    fail_for(tries, UNSERVED_S)
    assert not tries.fails("second", UNSERVED_S)
    assert tries.fails("new", 10.0)


@pytest.mark.parametrize("began", [True, False])
def test_a_model_that_was_there_meanwhile_is_waited_for_anew(tries: Tries, began: bool) -> None:
    fail_for(tries, UNSERVED_S)
    if began:
        tries.patience.begun(tries.job("other", 0.0))
    assert tries.fails("second", UNSERVED_S) is began


def test_a_job_that_has_begun_is_waited_for_anew(tries: Tries) -> None:
    fail_for(tries, UNSERVED_S)
    tries.patience.begun(tries.job("first", 0.0))
    assert tries.fails("first", UNSERVED_S)


def test_what_was_not_tried_lately_is_forgotten(tries: Tries) -> None:
    fail_for(tries, UNSERVED_S)
    tries.now += UNSERVED_S
    assert tries.fails("first", 2 * UNSERVED_S)
