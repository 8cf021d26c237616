"""When the requests of an elastic gang will be done: as the dealer would have it, and never before they can be."""

from dataclasses import replace

import pytest
from hypothesis import given

from tests.workers.test_dealer import SPEED, UNITS, hands, work
from workers.gang.dealer import Block, Work
from workers.gang.forecast import forecast


def test_one_has_all_ranks() -> None:
    assert forecast([work("a", 10)], UNITS, 5.0) == pytest.approx({"a": 10 * SPEED[8]})
    assert forecast([work("a", 10, tail_s=1.0)], UNITS, 5.0) == pytest.approx({"a": 10 * SPEED[8] + 1.0})


def test_two_share_them_and_who_is_left_has_all() -> None:
    found = forecast([work("short", 10), work("long", 20)], UNITS, 0.0)
    assert found["short"] == pytest.approx(10 * SPEED[4])
    assert found["long"] == pytest.approx(10 * SPEED[4] + 10 * SPEED[8])


def test_more_than_there_are_ranks_wait_for_the_first() -> None:
    many = [work(str(i), 10, step_s={1: 1.0}) for i in range(UNITS + 1)]
    ends = sorted(forecast(many, UNITS, 0.0).values())
    assert ends == pytest.approx([10.0] * UNITS + [20.0])


def test_one_that_decodes_keeps_a_rank_for_so_long() -> None:
    tail = work("tail", 1, step_s={1: 3.0}, at=Block(0, 1))
    assert forecast([tail], UNITS, 0.0) == pytest.approx({"tail": 3.0})


@given(hands())
def test_all_end_and_none_before_it_can(hand: tuple[list[Work], list[Work], float]) -> None:
    waiting, running, now = hand
    works = [replace(each, change_s=0.0) for each in (*waiting, *running)]
    found = forecast(works, UNITS, now)
    for each in works:
        assert found[each.id] >= min(each.left_s(degree) for degree in each.degrees) * (1 - 1e-9)
