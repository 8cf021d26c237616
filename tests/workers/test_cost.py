"""The cost model: what a gang has run it knows, the rest it scales."""

import dataclasses
import json

import pytest

from sp_core.degrees import ParallelDegrees
from workers.gang.cost import SHAPES_KEPT, CostModel, Costs
from workers.messages import GenerationRequest, GenerationResult, MediaInput

SQUARE = GenerationRequest("r", "m", "a cup", 512, 512, 10, seed=1)


def took(step_s: float, steps: int = 10, outside_s: float = 1.0) -> GenerationResult:
    return GenerationResult((), (), ParallelDegrees(), outside_s / 4, (step_s,) * steps, outside_s * 3 / 4)


def test_nothing_is_known_before_the_first_request() -> None:
    cost = CostModel()
    assert cost.seconds(SQUARE, 1) is None
    assert cost.mean_request_s is None
    assert cost.shapes == ()


def test_a_known_shape_costs_what_it_took() -> None:
    cost = CostModel()
    cost.observe(SQUARE, 2, took(0.5))
    assert cost.seconds(SQUARE, 2) == pytest.approx(10 * 0.5 + 1)
    assert cost.seconds(SQUARE, 2, steps_done=7) == pytest.approx(3 * 0.5 + 1)
    assert cost.seconds(dataclasses.replace(SQUARE, num_inference_steps=30), 2) == pytest.approx(30 * 0.5 + 1)
    assert cost.mean_request_s == pytest.approx(6.0)
    assert cost.shapes == ((512, 512, 1),)


def test_steps_are_those_that_the_scheduler_takes() -> None:
    """One of second order takes 2n - 1."""
    cost = CostModel()
    cost.observe(SQUARE, 2, took(0.5, steps=19))
    assert cost.seconds(SQUARE, 2) == pytest.approx(19 * 0.5 + 1)
    assert cost.seconds(SQUARE, 2, steps_done=10) == pytest.approx(9 * 0.5 + 1)


@pytest.mark.parametrize(
    ("changes", "forwards", "times"),
    [({"width": 1024}, 1, 2), ({"num_frames": 9}, 1, 9), ({"n": 3}, 1, 3), ({}, 2, 2), ({"height": 256}, 2, 1)],
)
def test_an_unseen_request_is_scaled_by_forwards_and_tokens(changes: dict[str, int], forwards: int, times: int) -> None:
    cost = CostModel()
    cost.observe(SQUARE, 1, took(0.5))
    request = dataclasses.replace(SQUARE, **changes)
    assert cost.seconds(request, forwards) == pytest.approx(10 * 0.5 * times + 1)


def test_the_nearest_known_shape_is_scaled_not_the_latest() -> None:
    cost = CostModel()
    large = dataclasses.replace(SQUARE, width=2048, height=2048)
    cost.observe(large, 1, took(16.0, outside_s=8.0))  # twice as slow per token as the small one
    cost.observe(SQUARE, 1, took(0.5))
    near_large = dataclasses.replace(SQUARE, width=2048, height=1024)
    near_small = dataclasses.replace(SQUARE, width=512, height=1024)
    assert cost.seconds(near_large, 1) == pytest.approx(10 * 8.0 + 8)
    assert cost.seconds(near_small, 1) == pytest.approx(10 * 1.0 + 1)


def test_it_follows_a_gang_that_becomes_slower() -> None:
    cost = CostModel()
    for step_s in [0.5] * 5 + [1.0] * 20:
        cost.observe(SQUARE, 1, took(step_s))
    assert cost.seconds(SQUARE, 1) == pytest.approx(11.0, rel=0.01)


def test_a_first_step_that_compiles_is_not_the_price_of_a_step() -> None:
    cost = CostModel()
    result = dataclasses.replace(took(0.5), step_seconds=(60.0, *(0.5,) * 9))
    cost.observe(SQUARE, 1, result)
    assert cost.seconds(SQUARE, 1) == pytest.approx(6.0)


def test_the_typical_request_is_the_mean_at_first_and_then_follows() -> None:
    cost = CostModel()
    for steps in (10, 30):
        cost.observe(dataclasses.replace(SQUARE, num_inference_steps=steps), 1, took(0.5, steps))
    assert cost.mean_request_s == pytest.approx((6 + 16) / 2)
    for _ in range(100):
        cost.observe(SQUARE, 1, took(0.5))
    assert cost.mean_request_s == pytest.approx(6.0, rel=0.02)


def test_shapes_are_forgotten_by_age_of_use() -> None:
    cost = CostModel()
    for side in range(16, 16 * (SHAPES_KEPT + 1), 16):
        cost.observe(dataclasses.replace(SQUARE, width=side), 1, took(0.5))
    cost.observe(dataclasses.replace(SQUARE, width=16), 1, took(0.5))  # used again: young
    cost.observe(dataclasses.replace(SQUARE, width=16, num_frames=5), 1, took(0.5))
    assert len(cost.shapes) == SHAPES_KEPT
    assert (16, 512, 1) in cost.shapes
    assert (32, 512, 1) not in cost.shapes


def learned(*observed: tuple[GenerationRequest, GenerationResult], pipeline: str = "FluxPipeline") -> Costs:
    """What the gateway gets, by the way that it comes."""
    cost = CostModel()
    for request, result in observed:
        cost.observe(request, 1, result)
    return Costs.from_stats(json.loads(json.dumps(cost.costs(pipeline).as_stats())))


def test_what_a_gang_has_learned_crosses_serve() -> None:
    costs = learned((SQUARE, took(0.5)), (SQUARE, took(0.5)))
    assert costs.seconds(SQUARE) == pytest.approx(10 * 0.5 + 1)
    assert costs.least_seconds(SQUARE) == pytest.approx(10 * 0.5 + 1)
    assert costs.seconds(dataclasses.replace(SQUARE, num_inference_steps=30)) == pytest.approx(30 * 0.5 + 1)
    twice = dataclasses.replace(SQUARE, n=2)
    assert costs.seconds(twice) == pytest.approx(20 * 0.5 + 1)
    assert costs.least_seconds(twice) == pytest.approx(10 * 0.5 + 1)  # a smaller one, at least
    small = dataclasses.replace(SQUARE, width=256)
    assert costs.seconds(small) == pytest.approx(5 * 0.5 + 1)
    assert costs.least_seconds(small) == 0  # nothing as small was measured


def test_before_anything_was_measured_nothing_is_invented() -> None:
    for costs in (learned(), Costs.from_stats({}), learned((SQUARE, took(0.5)), pipeline="AnotherPipeline")):
        assert (costs.seconds(SQUARE), costs.least_seconds(SQUARE)) == (0, 0)


def test_one_request_alone_does_not_say_what_is_needed_at_least() -> None:
    """It may have been the first, which is slow; nobody would be let in who could show better."""
    assert learned((SQUARE, took(5.0))).least_seconds(SQUARE) == 0
    costs = learned((SQUARE, took(5.0, outside_s=9.0)), (SQUARE, took(0.5)), (SQUARE, took(2.0)))
    assert costs.least_seconds(SQUARE) == pytest.approx(10 * 0.5 + 1)
    assert costs.seconds(SQUARE) > 20


def test_the_forwards_of_a_step_are_those_of_the_pipeline() -> None:
    guided, plain = dataclasses.replace(SQUARE, negative_prompt="b"), SQUARE
    cost = CostModel()
    cost.observe(plain, 1, took(0.5))
    cost.observe(guided, 2, took(1.5))
    costs = cost.costs("QwenImagePipeline")
    assert costs.seconds(plain) == pytest.approx(10 * 0.5 + 1)
    assert costs.seconds(guided) == pytest.approx(10 * 1.5 + 1)
    assert cost.costs("FluxPipeline").seconds(guided) == pytest.approx(10 * 0.5 + 1)  # it has one branch


def test_a_scheduler_of_second_order_counts_as_it_is_asked() -> None:
    costs = learned((SQUARE, took(0.5, steps=19)), (SQUARE, took(0.5, steps=19)))
    assert costs.seconds(SQUARE) == costs.least_seconds(SQUARE) == pytest.approx(19 * 0.5 + 1)


def test_a_picture_to_begin_with_costs_its_share_of_the_steps_and_its_encoding() -> None:
    """What is learned of such requests is not taken for what others cost."""
    cost = CostModel()
    edit = dataclasses.replace(SQUARE, inputs=(MediaInput("image", b"a"),), strength=0.4)
    cost.observe(SQUARE, 1, took(0.5))
    cost.observe(edit, 1, took(0.5, steps=4, outside_s=3.0))
    unsaid = dataclasses.replace(edit, strength=None)
    cost.observe(unsaid, 1, took(0.5, steps=6, outside_s=3.0))
    for known in (cost.costs("FluxPipeline").seconds, lambda request: cost.seconds(request, 1)):
        assert known(SQUARE) == pytest.approx(10 * 0.5 + 1)
        assert known(edit) == pytest.approx(4 * 0.5 + 3)
        assert known(dataclasses.replace(edit, strength=0.8)) == pytest.approx(8 * 0.5 + 3)
        assert known(unsaid) == pytest.approx(6 * 0.5 + 3)
    cost.observe(edit, 1, took(0.5, steps=4, outside_s=3.0))
    assert cost.costs("FluxPipeline").least_seconds(edit) == pytest.approx(4 * 0.5 + 3)


def test_beside_others_a_request_takes_longer_than_it_costs() -> None:
    """On a quarter of an elastic gang. The second counts with the usual weight."""
    cost = CostModel()
    cost.observe(SQUARE, 1, took(0.5), share=0.25)
    assert cost.mean_request_s == pytest.approx(6.0)
    assert cost.mean_cost_s == pytest.approx(1.5)
    costs = Costs.from_stats(json.loads(json.dumps(cost.costs("FluxPipeline").as_stats())))
    assert costs.seconds_and_share(SQUARE) == pytest.approx((6.0, 0.25))
    cost.observe(SQUARE, 1, took(0.5))
    assert cost.costs("FluxPipeline").known[0].share == pytest.approx(0.25 + 0.3 * 0.75)


def test_the_least_is_what_the_quickest_degree_would_take() -> None:
    """Whether a deadline can be met is not judged by requests that had few ranks."""
    cost = CostModel()
    for _ in range(2):
        cost.observe(SQUARE, 1, took(0.5), share=0.25, least_step_s=0.2)
    assert cost.costs("FluxPipeline").least_seconds(SQUARE) == pytest.approx(10 * 0.2 + 1.0)
