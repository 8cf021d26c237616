"""Progress: bars on a terminal, plain lines elsewhere."""

import sys

import pytest

from service.cli.progress import LoadBars, StepProgress
from workers.messages import StepEvent


def test_without_a_terminal_loading_is_told_in_quarters(capsys: pytest.CaptureFixture[str]) -> None:
    with LoadBars(["a", "b"]) as bars:
        for a, b in ((0, 0), (0.1, 0), (0.24, 0), (0.25, 1), (0.7, 1), (0.6, 1), (0.999, 1), (1, 1), (1, 1)):
            bars.show({"a": a, "b": b})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "a: 0 % loaded", "b: 0 % loaded", "a: 25 % loaded", "b: ready", "a: 70 % loaded", "a: 99 % loaded", "a: ready",
    ]  # fmt: skip


def test_on_a_terminal_loading_has_a_bar_per_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with LoadBars(["a", "longer"]) as bars:
        bars.show({"a": 0.5, "longer": 1.0})
        bars.show({"a": 0.4})  # a gang that starts again does not turn the bar back
        assert [task.completed for task in bars._bars.tasks] == [0.5, 1.0]
    err = capsys.readouterr().err
    assert "longer" in err and "100%" in err


def test_on_a_terminal_steps_have_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with StepProgress() as progress:
        for step in (1, 2, 1):  # the third is a retry
            progress.show(StepEvent(step, 2, 0.5))
        assert [task.completed for task in progress._bar.tasks] == [1]
    assert "1/2" in capsys.readouterr().err


def test_steps_are_lines_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    with StepProgress() as progress:
        progress.show(StepEvent(1, 2, 0.5))
    assert capsys.readouterr().err == "step 1/2 0.500 s\n"
