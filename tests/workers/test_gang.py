"""A gang's own view of its request and its ranks, without Ray."""

import asyncio
import contextvars
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import prometheus_client
import pytest

from deploy.families.qwen_image import FAMILY
from deploy.spec import LoRA, ModelSpec
from workers.errors import GangLost, RequestCancelled, RequestFailed
from workers.gang.adapter_sync import AdapterSync
from workers.gang.gang import Gang
from workers.gang.setup import Setup
from workers.gang.stats import GangBacklog, Movement
from workers.messages import Begun, GenerationRequest
from workers.observing import GangMetrics

INK, CHALK = LoRA(name="ink", source="/ink"), LoRA(name="chalk", source="/chalk")
REQUEST = GenerationRequest("r", "a", "a cup", 64, 64, 4, seed=1)


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
    gang = Gang({})
    assert gang._progress() == ("starting", 0, 0)
    gang._ranks = SimpleNamespace(  # type: ignore[assignment]
        statuses=[SimpleNamespace(phase=said[0], step=said[1], total_steps=7)],
        answering=answering,
        answered=lambda: None,
    )
    gang._ranks.living = gang._ranks.statuses
    gang._running = running
    assert gang._progress()[:2] == now
    assert gang._progress().total_steps == (7 if now[1] else 4 if running else 0)


async def refuse(_: Any) -> None:
    raise RequestFailed("no such file")


def test_a_gang_without_its_ranks_says_so_until_new_ones_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(name="unlucky", source="/a")
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"))
    monkeypatch.setattr("workers.gang.gang.serve.get_replica_context", lambda: context)

    async def story() -> list[dict[str, Any]]:
        gang, ready = Gang(spec.fixed), asyncio.Event()
        metrics, context = GangMetrics("unlucky", "0"), contextvars.copy_context()
        adapters = AdapterSync(())
        gang._setup = Setup(spec, adapters, FAMILY, None, context, {}, metrics)
        adapters.want((INK,))
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
        gang._ranks = ranks  # type: ignore[assignment]

        async def start() -> Any:
            await ready.wait()
            ranks.living = ranks.statuses
            return ranks

        monkeypatch.setattr(gang, "_start_ranks", start)
        gang._on_lost("died")
        await asyncio.sleep(0)
        lost = gang.record_routing_stats()["now"]
        ready.set()
        assert gang._replacement is not None
        await gang._replacement
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


class FakeRanks:
    """Ranks that run one request at a time, as far as a change of adapters needs them."""

    startup_s = 1.0
    phases: ClassVar = {"process": 1.0}

    def __init__(self, loras: tuple[LoRA, ...]) -> None:
        self.loras = loras
        self.asked: list[tuple[LoRA, ...]] = []
        self.refused: set[LoRA] = set()
        self.lost: Exception | None = None
        self.cancelled: list[str] = []
        self.statuses = [
            SimpleNamespace(
                progress=0, latest_step=(), phase="idle", step=0, total_steps=0, pid=7, kernel="", guidance=""
            )
        ]
        self.living = self.statuses
        self.has_answered = False
        self.finish, self.has_room = asyncio.Event(), asyncio.Event()
        self.has_room.set()

    async def run(self, request: GenerationRequest, _on_spans: Any = None) -> Any:
        await self.finish.wait()
        if self.lost:
            raise self.lost
        yield "done"

    async def room(self) -> None:
        await self.has_room.wait()

    answering = False

    async def end(self) -> None:
        self.living = []

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.lost = RequestCancelled("as all ranks agree")
        self.finish.set()

    async def set_loras(self, loras: tuple[LoRA, ...]) -> None:
        self.asked.append(loras)
        if self.refused & set(loras):
            raise RequestFailed("no such file")
        self.loras = loras

    def serve_metrics(self, **_: Any) -> None:
        pass

    def renumber(self, _: str) -> None:
        pass


@pytest.fixture
def inked(monkeypatch: pytest.MonkeyPatch) -> tuple[Gang, FakeRanks]:
    """A gang whose ranks have the adapter ink."""
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"), rank=SimpleNamespace(rank=0))
    monkeypatch.setattr("workers.gang.gang.serve.get_replica_context", lambda: context)
    monkeypatch.setattr("workers.gang.gang.create", lambda model, storage, name: ["fresh"])
    spec = ModelSpec(name="inked", source="/a", loras=(INK,))
    gang, ranks = Gang(spec.fixed), FakeRanks((INK,))
    metrics = GangMetrics("inked", "0")
    gang._setup = Setup(spec, AdapterSync((INK,)), FAMILY, None, contextvars.copy_context(), {}, metrics)
    gang._ranks = ranks  # type: ignore[assignment]
    return gang, ranks


async def deploy(gang: Gang, *loras: LoRA) -> None:
    """What Serve does when the deployment file names these adapters."""
    live = ModelSpec(name="inked", source="/a", loras=loras).live
    config = {"model": live, "storage": {}, "metrics": {"host": "127.0.0.1", "port": None}}
    await gang.reconfigure(config)


async def ask(gang: Gang, caller: str = "") -> list[Any]:
    return [report async for report in gang.generate(REQUEST, caller)]


async def settled(gang: Gang) -> str:
    """Let all that is pending happen; return what the gang reports."""
    for _ in range(50):
        await asyncio.sleep(0)
    return str(gang.record_routing_stats()["now"]["trouble"])


def test_adapters_follow_the_file_however_often_it_changes_during_a_request(inked: tuple[Gang, FakeRanks]) -> None:
    gang, ranks = inked

    async def story() -> None:
        running = asyncio.ensure_future(ask(gang))
        await settled(gang)
        await deploy(gang)
        assert await settled(gang) == "the adapters change to none after the running request"
        await deploy(gang, INK)
        assert await settled(gang) == ""
        await deploy(gang, CHALK)
        await deploy(gang, INK)
        ranks.finish.set()
        await running
        assert await settled(gang) == ""
        assert ranks.loras == (INK,)
        await deploy(gang, INK, CHALK)
        assert await settled(gang) == ""
        assert ranks.loras == (INK, CHALK)

    asyncio.run(story())


def test_adapters_that_were_deployed_before_a_loss_reach_the_new_ranks(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    gang, ranks = inked
    started: list[FakeRanks] = []

    async def start(model: ModelSpec, processes: list[Any], *_: Any) -> FakeRanks:
        assert processes == ["fresh"]
        started.append(FakeRanks(model.loras))
        return started[-1]

    monkeypatch.setattr("workers.gang.gang.RankGroup.start", start)

    async def story() -> None:
        running = asyncio.ensure_future(ask(gang))
        await settled(gang)
        await deploy(gang, CHALK)
        ranks.lost = GangLost("struck")
        gang._on_lost("died")
        ranks.finish.set()
        with pytest.raises(GangLost):
            await running
        assert await settled(gang) == ""
        assert gang._spares._refilling is None  # nobody has asked for spare ranks
        (new,) = started
        assert (new.asked, new.loras) == ([(CHALK,)], (CHALK,))

    asyncio.run(story())


def test_ranks_that_never_answer_count_as_lost_in_a_row(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that draw, and end while they encode."""
    gang, ranks = inked
    monkeypatch.setattr(gang, "_replace_ranks", lambda: asyncio.sleep(0))

    async def story() -> None:
        counts = []
        for answered in (False, False, True, False):
            ranks.has_answered = answered
            gang._on_lost("died")
            counts.append(gang._losses)
            gang._whole.set()  # they are replaced
        assert counts == [1, 2, 1, 2]
        await asyncio.sleep(0)

    asyncio.run(story())


def test_a_request_that_waits_while_ranks_are_lost_runs_on_the_new_ones(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not begun, so it must not count as a request that cost a gang."""
    gang, _ = inked
    new, may = FakeRanks((INK,)), asyncio.Event()

    async def start(*_: Any) -> FakeRanks:
        await may.wait()
        return new

    monkeypatch.setattr("workers.gang.gang.RankGroup.start", start)
    monkeypatch.setattr("workers.gang.gang.RankGroup.run", None)

    async def story() -> None:
        async with gang._turn.alone():  # a change of adapters, during which the ranks are lost
            asked = asyncio.ensure_future(ask(gang))
            await settled(gang)
            gang._on_lost("died")
        await settled(gang)
        assert not asked.done()
        assert GangBacklog.from_stats(gang.record_routing_stats()).replacing
        new.finish.set()
        may.set()
        assert await asked == [Begun(), "done"]
        assert not GangBacklog.from_stats(gang.record_routing_stats()).replacing

    asyncio.run(story())


def test_a_request_waits_for_room_and_outlives_the_ranks_meanwhile(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many answers are open. The gang is busy then, but has not begun."""
    gang, ranks = inked
    new = FakeRanks((INK,))

    async def start(*_: Any) -> FakeRanks:
        return new

    monkeypatch.setattr("workers.gang.gang.RankGroup.start", start)

    async def story() -> None:
        ranks.has_room.clear()
        asked = asyncio.ensure_future(ask(gang))
        await settled(gang)
        assert GangBacklog.from_stats(gang.record_routing_stats()).busy
        gang._on_lost("died")
        ranks.lost = GangLost("struck")
        ranks.finish.set()
        ranks.has_room.set()
        new.finish.set()
        assert await asked == [Begun(), "done"]
        assert not GangBacklog.from_stats(gang.record_routing_stats()).busy

    asyncio.run(story())


def test_a_request_ends_when_its_caller_is_killed(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    gang, ranks = inked
    living = {"SERVE_REPLICA::gateway"}

    def get_actor(name: str, namespace: str) -> None:
        if name not in living:
            raise ValueError(f"no actor {name} in {namespace}")

    monkeypatch.setattr("workers.gang.caller.PERIOD_S", 0.01)
    monkeypatch.setattr("workers.gang.caller.ray.is_initialized", lambda: True)
    monkeypatch.setattr("workers.gang.caller.ray.get_actor", get_actor)

    async def story() -> None:
        running = asyncio.ensure_future(ask(gang, "SERVE_REPLICA::gateway"))
        await asyncio.sleep(0.2)
        assert ranks.cancelled == []
        living.clear()
        with pytest.raises(RequestCancelled):
            await asyncio.wait_for(running, 60)
        assert ranks.cancelled == [REQUEST.request_id]
        assert gang.record_autoscaling_stats()["busy"] == 0

    asyncio.run(story())


def test_a_refusal_ends_with_its_cause(inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch) -> None:
    gang, ranks = inked
    ranks.refused = {CHALK}
    monkeypatch.setattr("workers.gang.gang.ADAPTERS_AGAIN_S", 0.05)

    async def story() -> None:
        await deploy(gang, INK, CHALK)
        assert await settled(gang) == "the adapters cannot be changed: no such file"
        assert ranks.loras == (INK,)
        await deploy(gang, INK)
        assert await settled(gang) == ""
        await deploy(gang, CHALK)
        assert "cannot be changed" in await settled(gang)
        ranks.refused = set()  # the file is there now
        async with asyncio.timeout(60):
            while ranks.loras != (CHALK,):
                await asyncio.sleep(0.01)
        assert await settled(gang) == ""

    asyncio.run(story())


def test_a_busy_gang_has_moved_when_a_rank_has_passed_a_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rank = [100.0], SimpleNamespace(progress=1)
    monkeypatch.setattr("workers.gang.stats.time.time", lambda: clock[0])
    movement = Movement()
    told = []
    for now, progress, idle in ((110, 1, True), (120, 1, False), (130, 2, False), (140, 2, False), (150, 2, True)):
        clock[0], rank.progress = now, progress
        told.append(movement.at([rank], idle))  # type: ignore[list-item]
    assert told == [110, 110, 130, 130, 150]


def test_only_the_first_ranks_of_a_gang_test_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacements come back fast: of them only the groups are tried."""
    spec = ModelSpec(name="tested", source="/a")
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"))
    monkeypatch.setattr("workers.gang.gang.serve.get_replica_context", lambda: context)
    monkeypatch.setattr("workers.gang.gang.create", lambda *_: [])
    started: list[bool] = []

    async def start(model: ModelSpec, *_: Any) -> Any:
        started.append(model.self_test)
        return SimpleNamespace(phases={"load": 1.0}, serve_metrics=lambda: None)

    monkeypatch.setattr("workers.gang.gang.RankGroup.start", start)

    async def story() -> None:
        gang = Gang(spec.fixed)
        metrics, context = GangMetrics("tested", "0"), contextvars.copy_context()
        gang._setup = Setup(spec, AdapterSync(()), FAMILY, None, context, {}, metrics)
        for _ in range(2):
            gang._ranks = await gang._start_ranks()

    asyncio.run(story())
    assert started == [True, False]


def test_lost_ranks_are_replaced_by_spare_processes_if_there_are_any(
    inked: tuple[Gang, FakeRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    gang, _ = inked
    gang._setup = replace(gang._started, model=gang._started.model.model_copy(update={"spare_ranks": True}))
    used: list[list[Any]] = []
    refilled: list[str] = []

    async def start(model: ModelSpec, processes: list[Any], *_: Any) -> FakeRanks:
        used.append(processes)
        return FakeRanks(model.loras)

    async def take() -> list[Any]:
        return ["spare"] if len(used) == 0 else []

    monkeypatch.setattr("workers.gang.gang.RankGroup.start", start)
    monkeypatch.setattr(gang._spares, "take", take)
    monkeypatch.setattr(gang._spares, "refill", lambda model, storage, name: refilled.append(name))

    async def story() -> None:
        for _ in range(2):
            gang._on_lost("died")
            assert gang._replacement is not None
            await gang._replacement
        assert used == [["spare"], ["fresh"]]
        assert refilled == ["inked-r-1", "inked-r-2"]

    asyncio.run(story())
