"""The backlog policy: seconds of work decide, and what Serve hands it is read as it comes."""

from typing import Any

import pytest
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from service.autoscaling import MOST_GANGS, RECOVERY_S, BacklogPolicy, PolicyState, decide, gangs_for_load, loads_in
from workers.gang.stats import GangLoad


def gang(busy: float = 0.0, remaining_s: float = 0.0, request_s: float = 20.0, startup_s: float = 60.0) -> GangLoad:
    return GangLoad(remaining_s, request_s, busy, startup_s, target_s=30.0)


def context(loads: list[GangLoad], queued: float = 0.0, **changes: Any) -> AutoscalingContext:
    table: dict[str, dict[Any, float]] = {}
    for number, load in enumerate(loads):
        for name, value in load.as_stats().items():
            table.setdefault(name, {})[number] = value
    given: dict[str, Any] = {
        "deployment_id": None,
        "deployment_name": "Gang",
        "app_name": "model-demo",
        "current_num_replicas": len(loads),
        "target_num_replicas": len(loads),
        "running_replicas": [],
        "total_num_requests": queued,
        "total_queued_requests": queued,
        "aggregated_metrics": table,
        "raw_metrics": None,
        "capacity_adjusted_min_replicas": 0,
        "capacity_adjusted_max_replicas": 10,
        "policy_state": {},
        "last_scale_up_time": None,
        "last_scale_down_time": None,
        "current_time": 1000.0,
        "config": AutoscalingConfig(min_replicas=0, max_replicas=10, upscale_delay_s=0),
    }
    return AutoscalingContext(**{**given, **changes})


def settled(loads: list[GangLoad], queued: float = 0.0, seconds: int = 3000) -> PolicyState:
    """The decision after the same picture for a long time."""
    memory = None
    for at_s in range(0, seconds, 10):
        memory = decide(at_s, queued, loads, 0, memory)
    assert memory is not None
    return memory


def test_nothing_to_do_wants_nothing() -> None:
    assert settled([gang()]).wanted == 0
    assert settled([gang()] * 5).wanted == 0


def test_little_to_do_holds_one_gang() -> None:
    assert settled([gang(busy=0.1, remaining_s=1)]).wanted == 1


def test_waiting_work_counts_in_seconds_not_in_requests() -> None:
    cheap = decide(0, 12, [gang(busy=1, request_s=1.0)] * 2, 0).wanted
    dear = decide(0, 12, [gang(busy=1, request_s=100.0)] * 2, 0).wanted
    assert cheap == 3
    assert dear >= 12 * 100 / 30


def test_a_backlog_that_is_gone_before_a_gang_could_start_starts_none() -> None:
    slack = [gang(busy=0.25)] * 4
    assert decide(0, 5, slack, 0, settled(slack)).wanted <= 4
    full = [gang(busy=1)] * 4
    assert decide(0, 5, full, 0, settled(full)).wanted > 4


def test_gangs_that_start_already_are_counted() -> None:
    full = [gang(busy=1)] * 4
    before = settled(full)
    alone, helped = (decide(3000, 12, full, starting, before).wanted for starting in (0, 4))
    assert helped < alone


def test_a_growing_queue_shows_the_load_that_busy_gangs_hide() -> None:
    memory = None
    for second in range(0, 300, 10):
        memory = decide(second, 0.1 * second, [gang(busy=1, remaining_s=10)] * 2, 0, memory)
    assert memory is not None
    assert memory.offered == pytest.approx(2 + 0.1 * 20, rel=0.15)


def test_a_better_estimate_of_a_request_is_no_work_that_went() -> None:
    guessed = settled([gang(busy=1, request_s=20.0)] * 4, queued=6)
    learned = decide(3000, 6, [gang(busy=1, request_s=2.0)] * 4, 0, guessed)
    assert learned.offered == pytest.approx(guessed.offered) == pytest.approx(4)


def test_the_number_is_steady_under_a_steady_load() -> None:
    memory, wanted = None, set()
    for tick in range(400):
        busy = [
            gang(busy=float((tick + number) % 3 > 0), remaining_s=10.0 * ((tick + number) % 3 > 0))
            for number in range(6)
        ]
        memory = decide(10.0 * tick, 0, busy, 0, memory)
        if tick > 100:
            wanted.add(memory.wanted)
    assert len(wanted) == 1


def test_enough_gangs_for_the_load() -> None:
    assert gangs_for_load(0.0, 20, 30) == 1
    assert gangs_for_load(3.0, 20, 1e9) == 4  # any wait will do: more than the load itself, no more
    patient, hasty = gangs_for_load(8.0, 20, 60), gangs_for_load(8.0, 20, 1)
    assert 8 < patient < hasty
    assert gangs_for_load(80.0, 20, 30) < 10 * patient  # large fleets need a smaller share of spare gangs


def test_gangs_that_have_not_reported_all_are_left_out() -> None:
    table = {name: {"a": value, "b": value} for name, value in gang().as_stats().items()}
    del table["target_s"]["b"]
    assert loads_in(table) == [gang()]
    assert loads_in({}) == []


def test_without_gangs_a_waiting_request_wakes_one() -> None:
    policy = BacklogPolicy()
    assert policy(context([], queued=3))[0] == 1
    assert policy(context([], queued=0))[0] == 0


def test_when_all_gangs_are_lost_those_that_start_in_their_places_are_kept() -> None:
    """Serve applies at once what a policy wants while no gang runs, whatever `downscale_delay_s` says."""
    policy = BacklogPolicy()
    _, state = policy(context([gang(busy=1, remaining_s=10)] * 4))
    lost = {"policy_state": state, "current_num_replicas": 0, "target_num_replicas": 4, "current_time": 1010.0}
    assert policy(context([], queued=3, **lost))[0] == 4


def test_before_the_first_report_the_target_stays() -> None:
    running = context([], queued=0, current_num_replicas=2, target_num_replicas=3)
    assert BacklogPolicy()(running)[0] == 3


@pytest.mark.parametrize(("loads", "starting"), [(1, 0), (1, 1), (0, 1), (2, 0)])
def test_the_first_decision_after_a_loss_of_the_controller_keeps_what_runs(loads: int, starting: int) -> None:
    """One gang is busy: that alone asked for a second one."""
    busy = [gang(busy=1, remaining_s=15)] * min(loads, 1) + [gang()] * (loads - 1)
    policy, state = BacklogPolicy(), {}
    sizes = {"current_num_replicas": loads, "target_num_replicas": loads + starting}
    for second in range(5):
        wanted, state = policy(context(busy, policy_state=state, current_time=1000.0 + second, **sizes))
        assert wanted == loads + starting if second == 0 else wanted <= loads + starting


def test_a_gang_that_never_started_is_given_up_when_nobody_waits() -> None:
    """The controller may have been lost at first; it was not if no gang has reported since."""
    policy, state = BacklogPolicy(), {}
    pending = {"current_num_replicas": 0, "target_num_replicas": 1}
    wanted = []
    for second in (0, 10, RECOVERY_S + 1):
        answer, state = policy(context([], policy_state=state, current_time=1000.0 + second, **pending))
        wanted.append(answer)
    assert wanted == [1, 1, 0]
    assert policy(context([], queued=1, policy_state=state, current_time=2000.0, **pending))[0] == 1


def test_the_load_fades_while_a_model_sleeps() -> None:
    policy = BacklogPolicy()
    _, state = policy(context([gang(busy=1, remaining_s=10)] * 4))
    _, asleep = policy(context([], policy_state=state, current_time=5000.0))
    assert 2 < state["offered"] < 4
    assert asleep["offered"] < 0.01
    assert asleep["request_s"] == 20.0


def test_a_clock_that_is_set_back_while_a_model_sleeps_adds_no_load() -> None:
    policy = BacklogPolicy()
    _, state = policy(context([gang(busy=1, remaining_s=10)] * 4, current_time=1e6))
    _, asleep = policy(context([], policy_state=state, current_time=1e6 + 10))
    woken, _ = policy(context([gang()], queued=1, policy_state=asleep, current_time=1e6 + 20))
    for now_s in (1e6 - 3600, 1e6 - 2e5):
        _, asleep = policy(context([], policy_state=asleep, current_time=now_s))
        assert asleep["offered"] <= state["offered"]
    assert policy(context([gang()], queued=1, policy_state=asleep, current_time=1e6 - 2e5 + 10))[0] == woken


def test_a_clock_that_is_set_back_does_not_prolong_the_wait_for_lost_gangs() -> None:
    state: dict[str, Any] = {}
    policy, wanted = BacklogPolicy(), 1
    for now_s in (5000.0, 1000.0, 1000.0 + RECOVERY_S + 1):
        pending = {"current_num_replicas": 0, "target_num_replicas": 1, "current_time": now_s}
        wanted, state = policy(context([], policy_state=state, **pending))
    assert wanted == 0


def test_a_huge_load_is_answered_soon_by_the_most_gangs() -> None:
    huge = 1e12
    assert gangs_for_load(huge, 20, 30, 10) == 10
    assert gangs_for_load(huge, 20, 30) == MOST_GANGS
    assert [gangs_for_load(3.0, 20, 1e9, most) for most in (0, 1, 3, 4, 5)] == [1, 1, 3, 4, 4]
    state = dict(vars(PolicyState(990.0, offered=huge)))
    assert BacklogPolicy()(context([gang()], policy_state=state))[0] >= 10


def test_serve_asks_often_and_gets_the_same_answer_within_a_second() -> None:
    policy = BacklogPolicy()
    wanted, state = policy(context([gang(busy=1)] * 2, queued=9))
    again = policy(context([gang()] * 2, policy_state=state, current_time=1000.5))
    assert again == (wanted, state)
    assert policy(context([gang()] * 2, policy_state=state, current_time=1002.0))[1] != state


def test_serve_finds_it_by_name_and_keeps_its_state_beside_its_own() -> None:
    policy = AutoscalingPolicy(policy_function="service.autoscaling:BacklogPolicy").get_policy()
    assert policy is BacklogPolicy
    wrapped = _apply_autoscaling_config(policy())
    wanted, state = wrapped(context([gang(busy=1, remaining_s=10)] * 2, queued=9))
    assert wanted == 2
    assert set(vars(PolicyState(0.0))) < set(state)  # Serve adds its counters
    again, _ = wrapped(context([gang(busy=1, remaining_s=10)] * 2, queued=9, policy_state=state, current_time=1010.0))
    assert again > 2
