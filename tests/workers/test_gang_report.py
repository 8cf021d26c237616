"""What a gang says of itself while requests run, and while its ranks are lost, without Ray."""

import asyncio
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest

from deploy.model_spec import ModelSpec
from tests.workers.gang_cases import INK, REQUEST, in_replica, setup_of
from workers.errors import RequestFailed
from workers.gang.cost import CostModel
from workers.gang.gang import Gang
from workers.gang.gang_report import GangReport
from workers.gang.stats import Movement
from workers.gang.supervisor import Supervisor
from workers.messages import GenerationRequest


@pytest.mark.parametrize(
    ("said", "running", "answering", "now"),
    [
        (("idle", 4), None, False, ("idle", 0)),
        (("idle", 4), None, True, ("encode_media", 0)),
        (("idle", 4), REQUEST, True, ("encode", 0)),  # the rank has not said anything since it got the request
        (("denoise", 2), REQUEST, True, ("denoise", 2)),
        (("decode", 4), REQUEST, False, ("decode", 4)),
    ],
)
def test_a_gang_knows_of_its_request_before_its_ranks_say_so(
    said: tuple[Any, int], running: GenerationRequest | None, answering: bool, now: tuple[str, int]
) -> None:
    supervisor = Supervisor(setup_of(ModelSpec(name="busy", source="/a")), None)
    report = GangReport(supervisor._setup, supervisor, None, CostModel())
    assert report.progress == ("starting", 0, 0)
    ranks = SimpleNamespace(statuses=[SimpleNamespace(phase=said[0], step=said[1], total_steps=7)], answering=answering)
    ranks.living = ranks.statuses
    supervisor.ranks, supervisor.running = ranks, running  # type: ignore[assignment]
    assert report.progress[:2] == now
    assert report.progress.total_steps == (7 if now[1] else 4 if running else 0)


async def refuse(_: Any) -> None:
    raise RequestFailed("no such file")


def test_a_gang_without_its_ranks_says_so_until_new_ones_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(name="unlucky", source="/a")
    in_replica(monkeypatch)

    async def story() -> list[dict[str, Any]]:
        gang, ready = Gang(spec.fixed), asyncio.Event()
        supervisor = gang._set_up(setup_of(spec))
        gang._setup.adapters.want((INK,))
        ranks = SimpleNamespace(
            statuses=[
                SimpleNamespace(
                    progress=0,
                    latest_step=(),
                    phase="denoise",
                    step=3,
                    total_steps=4,
                    pid=7,
                    kernel="fast",
                    guidance="one forward",
                )
            ],
            startup_s=1.0,
            set_loras=refuse,
            answering=False,
            has_answered=False,
            living=[],
            end=lambda: asyncio.sleep(0),
        )
        supervisor.ranks = ranks  # type: ignore[assignment]

        async def start() -> Any:
            await ready.wait()
            ranks.living = ranks.statuses
            return ranks

        monkeypatch.setattr(supervisor, "_start_ranks", start)
        supervisor._on_lost("died")
        await asyncio.sleep(0)
        lost = gang.record_routing_stats()["now"]
        ready.set()
        assert supervisor._replacement is not None
        await supervisor._replacement
        return [lost, gang.record_routing_stats()["now"]]

    lost, back = asyncio.run(story())
    assert (lost["phase"], lost["pids"], lost["kernel"]) == ("starting", [], "")
    assert (back["kernel"], back["guidance"]) == ("fast", "one forward")
    assert lost["trouble"] == "a gang has lost its ranks, new ones start"
    assert (back["pids"], back["trouble"]) == ([7], "the adapters cannot be changed: no such file")
    assert (
        prometheus_client.REGISTRY.get_sample_value("spray_gang_restarts_total", {"model": "unlucky", "reason": "died"})
        == 1
    )


def test_a_busy_gang_has_moved_when_a_rank_has_passed_a_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rank = [100.0], SimpleNamespace(progress=1)
    monkeypatch.setattr("workers.gang.stats.time.time", lambda: clock[0])
    movement = Movement()
    told = []
    for now, progress, idle in ((110, 1, True), (120, 1, False), (130, 2, False), (140, 2, False), (150, 2, True)):
        clock[0], rank.progress = now, progress
        told.append(movement.at([rank], idle))  # type: ignore[list-item]
    assert told == [110, 110, 130, 130, 150]
