"""What a person sees of a cluster: tables, with colors on a terminal only; words go to standard error."""

import sys

import pytest

from service.api.responses import model_object
from service.cli.output import cluster_table, models_table, plain, say, show
from service.state.model_states import ModelState, cluster_object
from tests.service.test_model_states import FREE, HUGE, MODEL, NEVER, NODES, a_cluster, gang
from tests.support.backend import FakeBackend


def test_ps_has_a_line_per_gang_with_a_bar_for_what_it_computes() -> None:
    assert plain(cluster_table(a_cluster())).splitlines() == [
        "2 nodes, 128 of 128 CPU free, 8 of 8 GPU free",
        "MODEL  STATE    REPLICAS             LAYOUT            QUEUED  RUNNING",
        "a      running  2 (1-1, 1 starting)  ulysses_degree=2  3       [#####...............] denoise 5/20",
        "                                                               idle",
        "b      asleep   0 (0-1)              ulysses_degree=2  0",
    ]


@pytest.mark.parametrize(
    ("step", "total_steps", "bar"),
    [(0, 20, "." * 20), (1, 30, "." * 20), (29, 30, "#" * 19 + "."), (30, 30, "#" * 20), (1, 1, "#" * 20)],
)
def test_a_bar_is_full_only_at_the_last_step(step: int, total_steps: int, bar: str) -> None:
    body = cluster_object([(MODEL, ModelState("running", gangs=(gang(step, total_steps),)))], NODES, FREE)
    assert f"[{bar}] denoise {step}/{total_steps}" in plain(cluster_table(body))


def test_reasons_stand_below_the_table() -> None:
    body = cluster_object([(HUGE, ModelState("waiting", NEVER))], NODES, FREE)
    assert plain(cluster_table(body)).splitlines()[-1] == f"a: {NEVER}"


def test_models_has_a_line_per_model_with_what_may_be_asked() -> None:
    models = FakeBackend().models()
    listed = {"data": [model_object(models[name], ModelState("running")) for name in ("one", "paint", "film")]}
    assert plain(models_table(listed)).splitlines() == [
        "MODEL  TASKS          STATE    DEFAULT SIZE  STEPS  ADAPTERS  ALSO CALLED",
        "one    ?              running  1024x1024     50     ink       -",
        "paint  text-to-image  running  1024x1024     50     ink       brush, pencil",
        "film   text-to-video  running  64x64x5       4      ink       movie",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_have_colors_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show(cluster_table(a_cluster()))
    out = capsys.readouterr().out
    assert "[#####" in out  # brackets are no markup
    assert ("\x1b[" in out) == terminal


def test_words_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")
