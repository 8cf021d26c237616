"""A gang's own view of its request and its ranks, without Ray."""

import asyncio
import contextvars
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest

from deploy.families.qwen_image import FAMILY
from deploy.spec import ModelSpec
from workers.gang.gang import Gang, Setup
from workers.messages import GenerationRequest
from workers.metrics import GangMetrics

REQUEST = GenerationRequest("r", "a", "a cup", 64, 64, 4, seed=1)


@pytest.mark.parametrize(
    ("said", "running", "now"),
    [
        (("idle", 4), None, ("idle", 0)),
        (("idle", 4), REQUEST, ("encode", 0)),  # the rank has not said anything since it got the request
        (("denoise", 2), REQUEST, ("denoise", 2)),
        (("decode", 4), REQUEST, ("decode", 4)),
    ],
)
def test_a_gang_knows_of_its_request_before_its_ranks_say_so(
    said: tuple[Any, int], running: GenerationRequest | None, now: tuple[str, int]
) -> None:
    gang = Gang({})
    assert gang._progress() == ("starting", 0)
    gang._ranks = SimpleNamespace(statuses=[SimpleNamespace(phase=said[0], step=said[1])])  # type: ignore[assignment]
    gang._running = running
    assert gang._progress() == now


def test_a_gang_without_its_ranks_says_so_until_new_ones_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(name="unlucky", source="/a")
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"))
    monkeypatch.setattr("workers.gang.gang.serve.get_replica_context", lambda: context)

    async def story() -> list[dict[str, Any]]:
        gang, ready = Gang(spec.fixed), asyncio.Event()
        metrics, context = GangMetrics("unlucky", "0"), contextvars.copy_context()
        gang._setup = Setup(spec, FAMILY, None, context, {}, metrics)
        gang._refused = "no such file"
        ranks = SimpleNamespace(statuses=[SimpleNamespace(phase="denoise", step=3, pid=7)], startup_s=1.0)
        gang._ranks = ranks  # type: ignore[assignment]

        async def start() -> Any:
            await ready.wait()
            return ranks

        monkeypatch.setattr(gang, "_start_ranks", start)
        gang._on_lost()
        await asyncio.sleep(0)
        lost = gang.record_routing_stats()["now"]
        ready.set()
        assert gang._replacement is not None
        await gang._replacement
        return [lost, gang.record_routing_stats()["now"]]

    lost, back = asyncio.run(story())
    assert (lost["phase"], lost["pids"]) == ("starting", [])
    assert lost["trouble"] == "a gang has lost its ranks, new ones start"
    assert (back["pids"], back["trouble"]) == ([7], "no such file")
    assert prometheus_client.REGISTRY.get_sample_value("spray_gang_losses_total", {"model": "unlucky"}) == 1
