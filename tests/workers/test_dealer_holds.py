"""Several requests make room for one that needs more ranks than any of them has, each at its own boundary."""

from dataclasses import replace

import pytest

from tests.workers.test_dealer import UNITS, work
from workers.gang.dealer import Block, Work, deal

STEP_S = 2.0
SLOW = {1: STEP_S, 2: 1.1, 4: 0.6, 8: 0.4}


def running(rank: int, began: float, **changes: object) -> Work:
    """A long request on one rank, in a step that began then."""
    block = Block(rank, 1)
    long = work(f"long {rank}", 50, step_s=SLOW, at=block, stood_since=began, due=1000.0)
    return replace(long, **changes)  # type: ignore[arg-type]


def wide(due: float = 6.0) -> Work:
    """It is in time on all ranks alone: two seconds, of ten on one rank."""
    return work("wide", 10, due=due, stood_since=0.0)


def test_all_ranks_are_given_up_for_one_each_at_its_boundary() -> None:
    runs = {rank: running(rank, began=-0.2 * rank) for rank in range(UNITS)}
    now, begun_at = 0.0, None
    waiting = [wide(due=4.5)]
    while runs:
        first = min(runs.values(), key=lambda each: each.stood_since)
        assert first.at is not None
        now = first.stood_since + STEP_S
        del runs[first.at.first]
        waiting.append(replace(first, stood_since=now))
        dealt = deal(waiting, list(runs.values()), UNITS, now)
        assert not any(name.startswith("long") for name in dealt)
        begun_at = now if "wide" in dealt else begun_at
    assert begun_at == STEP_S
    assert deal(waiting, [], UNITS, now)["wide"] == Block(0, 8)


def test_nobody_gives_up_ranks_for_what_would_be_late_anyway() -> None:
    others = [running(rank, began=0.0) for rank in range(1, UNITS)]
    standing = replace(running(0, began=0.0), stood_since=1.0)
    assert deal([wide(due=3.5), standing], others, UNITS, 1.0)["long 0"] == Block(0, 1)  # 2 + 2.1 s at the earliest
    assert "long 0" not in deal([wide(due=4.5), standing], others, UNITS, 1.0)


def test_nobody_gives_up_ranks_for_what_comes_after_it() -> None:
    urgent = [running(rank, began=0.0, steps_left=1, due=3.0) for rank in range(1, UNITS)]
    standing = running(0, began=0.0)
    assert "long 0" in deal([wide(), standing], urgent, UNITS, 0.0)


def test_the_block_that_is_free_soonest_is_held() -> None:
    """A request for four ranks: those on the right half have nearly ended their steps."""
    half = work("half", 10, due=5.0, step_s={1: 2.0, 2: 1.0, 4: 0.4})
    runs = [running(rank, began=0.0 if rank < 4 else -1.9) for rank in range(UNITS) if rank not in (0, 4)]
    left, right = running(0, began=0.0), running(4, began=-2.0)
    dealt = deal([half, left, right], runs, UNITS, 0.0)
    assert dealt == {"long 0": Block(0, 1)}


@pytest.mark.parametrize(("step_s", "goes_on"), [(0.5, True), (1.5, False)])
def test_a_held_rank_is_lent_for_a_step_that_ends_before(step_s: float, goes_on: bool) -> None:
    others = [running(rank, began=0.0) for rank in range(1, UNITS)]
    quick = replace(running(0, began=1.1), step_s={1: step_s, 8: step_s / 5}, steps_left=100)
    dealt = deal([wide(), quick], others, UNITS, 1.1)  # the others end their steps in 0.9 s
    assert dealt == ({"long 0": Block(0, 1)} if goes_on else {})


def test_it_may_itself_take_a_step_meanwhile() -> None:
    others = [running(rank, began=0.0) for rank in range(1, UNITS)]
    assert deal([wide()], others, UNITS, 0.5) == {"wide": Block(0, 1)}  # one of a second; the others end in 1.5 s
    assert deal([wide()], others, UNITS, 1.1) == {}


def test_ranks_in_pieces_are_joined() -> None:
    """Four ranks are free, but no two of one block."""
    others = [running(rank, began=-1.1) for rank in range(0, UNITS, 2)]
    pair = work("pair", 10, due=7.0)  # in time on two ranks, not on one
    dealt = deal([pair, running(1, began=0.0)], others, UNITS, 0.0)
    assert dealt == {"long 1": Block(3, 1)}  # the first two are held
