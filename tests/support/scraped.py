"""What Prometheus reads of a cluster, and what must be in it after requests whose callers were told their metrics."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(url: str) -> Samples:
    """What the node answers."""
    families = text_string_to_metric_families(httpx.get(url, timeout=30, trust_env=False).text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    """0 where nothing was observed yet."""
    return samples.get((name, frozenset(labels.items())), 0.0)


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if holds():
                return
        except httpx.TransportError:  # between two processes nobody answers
            pass
        time.sleep(0.2)
    raise AssertionError("it never came about")


def check_steps(samples: Samples, told: list[dict[str, Any]]) -> None:
    """Of two requests for the model `demo` of two ranks, each with four steps."""
    for rank in "01":
        here = {"model": "demo", "replica": "0", "rank": rank}
        of_step = here | {"layout": "ulysses_degree=2", "shape": "64x48"}
        assert value(samples, "spray_step_seconds_count", **of_step) == 8
        assert value(samples, "spray_stage_seconds_count", **here, stage="denoise") == 2
        used, peak, limit = (
            value(samples, "spray_rank_memory_bytes", **here, kind=kind) for kind in ("used", "peak", "limit")
        )
        assert 1e8 < used <= peak < limit
    first = {"model": "demo", "replica": "0", "rank": "0"}
    steps = [seconds for metrics in told for seconds in metrics["step_seconds"]]
    of_step = first | {"layout": "ulysses_degree=2", "shape": "64x48"}
    assert value(samples, "spray_step_seconds_sum", **of_step) == pytest.approx(sum(steps), rel=1e-9)
    gang = {"model": "demo", "replica": "0"}
    assert value(samples, "spray_steps_total", **gang) == 8  # of the gang, not of each rank
    assert value(samples, "spray_pixels_total", **gang) == 2 * 64 * 48
    assert value(samples, "spray_prompt_tokens_total", **gang) > 2


def check_traffic(samples: Samples) -> None:
    """Two ranks trade heads for tokens: each sends something in each step, and one of them waits for the other."""
    waited = []
    for rank in "01":
        here = {"model": "demo", "replica": "0", "rank": rank}
        for op in ("all_to_all", "gather"):
            assert value(samples, "spray_collective_seconds_count", **here, op=op) == 8
            assert value(samples, "spray_collective_bytes_total", **here, op=op) > 0
        assert ("spray_collective_bytes_total", frozenset((here | {"op": "ring"}).items())) not in samples
        assert value(samples, "spray_straggler_seconds_count", **here) == 8
        waited.append(value(samples, "spray_straggler_seconds_sum", **here))
        in_collectives = sum(
            value(samples, "spray_collective_seconds_sum", **here, op=op) for op in ("all_to_all", "gather")
        )
        steps = here | {"layout": "ulysses_degree=2", "shape": "64x48"}
        assert waited[-1] <= in_collectives < value(samples, "spray_step_seconds_sum", **steps)
    assert sum(waited) > 0


def check_requests(samples: Samples, told: list[dict[str, Any]], calls: int) -> None:
    """Of these, among so many calls that were answered, and one that the ranks refused."""
    first = {"model": "demo", "replica": "0", "rank": "0"}
    of = {"encode": ("encode", "prepare"), "decode": ("decode",), "encode_media": ("encode_media",)}
    for name, stages in of.items():
        seconds = sum(metrics[f"{name}_seconds"] for metrics in told)
        observed = sum(value(samples, "spray_stage_seconds_sum", **first, stage=stage) for stage in stages)
        assert observed == pytest.approx(seconds, rel=1e-9)
    assert value(samples, "spray_requests_total", model="demo", outcome="ok") == 2
    assert value(samples, "spray_requests_total", model="demo", outcome="invalid_value") == 1
    assert value(samples, "spray_request_seconds_count", model="demo") == 2
    outside = ("encode_seconds", "decode_seconds", "encode_media_seconds")
    computed = sum(sum(metrics["step_seconds"]) + sum(metrics[stage] for stage in outside) for metrics in told)
    whole = value(samples, "spray_request_seconds_sum", model="demo")
    queued = value(samples, "spray_stage_seconds_sum", model="demo", replica="", rank="", stage="queue")
    assert whole == pytest.approx(computed + queued, rel=1e-9)
    route = "/v1/images/generations"
    assert value(samples, "spray_api_requests_total", route=route, code="200", key="") == calls
    assert value(samples, "spray_api_requests_total", route=route, code="400", key="") == 1
    assert value(samples, "spray_api_seconds_count", route=route) == calls + 1


def check_of_the_node(samples: Samples) -> None:
    """What there is beside requests."""
    for phase in ("place", "fetch", "process", "rendezvous", "load", "self_test", "warm_up"):
        assert value(samples, "spray_gang_start_seconds_count", model="demo", phase=phase) == 1, phase
    died = {"model": "demo", "reason": "died"}
    assert ("spray_gang_restarts_total", frozenset(died.items())) in samples  # from the start: 0, not nothing
    assert value(samples, "spray_gangs_wanted", model="demo", reason="fixed") == 1
    assert [value(samples, "spray_gangs_limit", model="demo", bound=bound) for bound in ("min", "max")] == [1, 1]
    gang = {"model": "demo", "replica": "0"}
    assert value(samples, "spray_capacity_seconds", **gang) == 1
    assert abs(value(samples, "spray_progress_timestamp_seconds", **gang) - time.time()) < 600
    for folder in ("models", "outputs", "metrics"):
        free, size = (value(samples, f"spray_disk_{what}_bytes", folder=folder) for what in ("free", "size"))
        assert 0 < free < size
