"""What `spray top` shows: a row per gang, where its steps' time goes, and what the autoscaler wants."""

import sys
from typing import Any

import pytest

from service.cli.commands import status
from service.cli.main import main
from service.cli.output import cluster_table, plain
from service.cli.top import top_table
from service.state.model_states import ModelState, cluster_object
from tests.service.test_model_states import FREE, MODEL, NODES, gang
from workers.gang.stats import step_split
from workers.messages import RankStatus


def statuses(*steps: tuple[float, ...]) -> list[RankStatus]:
    return [RankStatus(rank, 1, "", "denoise", 0, "m", 1.0, 1, latest_step=step) for rank, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("steps", "split"),
    [
        ([], None),
        ([()], None),
        ([(1.0, 0.5, 0.4), ()], None),  # one rank has said nothing yet
        (
            [(1.0, 0.5, 0.4), (1.0, 0.1, 0.0)],
            {"seconds": 1.0, "computes": 0.7, "transfers": 0.1, "waits": 0.2, "slowest": 1},
        ),
        (
            [(1.0, 0.5, 0.0), (1.0, 0.55, 0.05)],  # too little to name one
            {"seconds": 1.0, "computes": 0.475, "transfers": 0.5, "waits": 0.025, "slowest": None},
        ),
    ],
)
def test_where_a_step_goes(steps: list[tuple[float, ...]], split: Any) -> None:
    assert step_split(statuses(*steps)) == split


def watched() -> dict[str, Any]:
    busy, idle = gang(5, 20), gang(0, 0, "idle")
    busy["now"]["split"] = step_split(statuses((1.0, 0.5, 0.4), (1.0, 0.1, 0.0)))
    state = ModelState("running", "a reason", {"RUNNING": 2}, 3, (busy, idle))
    return cluster_object([(MODEL, state)], NODES, FREE, {"model-a": 1})


def test_a_row_per_gang_and_the_reasons_below() -> None:
    assert plain(top_table(watched())).splitlines() == [
        "MODEL  STATE    GANGS              QUEUED  WORK LEFT  NOW                                  "
        "A STEP  # computes = transfers . waits",
        "a      running  2, wants 1: fixed  3       1 s        [#####...............] denoise 5/20  "
        "[##############==....] 1.000 s: 70 % 10 % 20 %, for rank 1",
        "                                           1 s        idle",
        "a: a reason",
    ]


def test_an_elastic_gang_shows_who_has_which_ranks() -> None:
    busy = gang(1, 4)
    busy["now"]["requests"] = [
        {"request_id": "a", "ranks": [0, 1], "step": 5, "total_steps": 20},
        {"request_id": "b", "ranks": [3], "step": 0, "total_steps": 4},
        {"request_id": "c", "ranks": [], "step": 2, "total_steps": 4},
    ]
    cluster = cluster_object([(MODEL, ModelState("running", "", {"RUNNING": 1}, 3, (busy,)))], NODES, FREE)
    first, *others = [line.split("1 s  ")[-1].strip() for line in plain(top_table(cluster)).splitlines()[1:]]
    assert [first, *others] == [
        "[#####...............] 5/20 ranks 0-1",
        "[....................] 0/4 rank 3",
        "[##########..........] 2/4 waits",
    ]
    assert [line in plain(cluster_table(cluster)) for line in (first, *others)] == [True] * 3


def test_a_pipe_gets_one_look_and_a_terminal_many(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def look(at: str) -> dict[str, Any]:
        looks.append(at)
        if len(looks) == 4:
            raise KeyboardInterrupt
        return watched()

    monkeypatch.setattr(status, "read_cluster", look)
    assert main(["top", "--server", "http://here"]) == 0
    assert looks == ["http://here"] and capsys.readouterr().out == plain(top_table(watched())) + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["top", "--server", "http://here", "--seconds", "0.2"]) == 130
    assert len(looks) == 4
