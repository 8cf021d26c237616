"""A gang on ranks that compute nothing, without Ray: for tests of it and of its parts."""

import asyncio
import contextvars
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray.serve.schema import ReplicaRank

from deploy.families.qwen_image import FAMILY
from deploy.model_sections import LoRA
from deploy.model_spec import ModelSpec
from deploy.storage_spec import Storage
from workers.errors import RequestCancelled, RequestFailed
from workers.gang.adapter_sync import AdapterSync
from workers.gang.gang import Gang
from workers.gang.setup import Setup
from workers.gang.supervisor import Supervisor
from workers.messages import GenerationRequest
from workers.observing import GangMetrics

INK, CHALK = LoRA(name="ink", source="/ink"), LoRA(name="chalk", source="/chalk")
REQUEST = GenerationRequest("r", "a", "a cup", 64, 64, 4, seed=1)


def setup_of(spec: ModelSpec) -> Setup:
    """What the first `reconfigure` would settle."""
    metrics = GangMetrics(spec.name, "0")
    return Setup(spec, AdapterSync(spec.loras), FAMILY, Storage(), contextvars.copy_context(), {}, metrics)


def in_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Serve say which replica this is, and new processes be strings."""
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"))
    monkeypatch.setattr("workers.gang.supervisor.serve.get_replica_context", lambda: context)
    monkeypatch.setattr("workers.gang.supervisor.create", lambda model, storage, name: ["fresh"])


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
        self.numbers: list[str] = []
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

    def renumber(self, number: str) -> None:
        self.numbers.append(number)


def gang_with_ink(monkeypatch: pytest.MonkeyPatch) -> tuple[Gang, FakeRanks]:
    """A gang whose ranks have the adapter ink."""
    in_replica(monkeypatch)
    spec = ModelSpec(name="inked", source="/a", loras=(INK,))
    gang, ranks = Gang(spec.fixed), FakeRanks((INK,))
    gang._set_up(setup_of(spec)).ranks = ranks  # type: ignore[assignment]
    return gang, ranks


def supervisor_of(gang: Gang) -> Supervisor:
    """It has one."""
    assert gang._supervisor is not None
    return gang._supervisor


async def deploy(gang: Gang, *loras: LoRA, number: int = 0) -> None:
    """What Serve does when the deployment file names these adapters, or the gang is the one of this number."""
    live = ModelSpec(name="inked", source="/a", loras=loras).live
    config = {"model": live, "storage": {}, "metrics": {"host": "127.0.0.1", "port": None}}
    await gang.reconfigure(config, rank=ReplicaRank(rank=number, node_rank=0, local_rank=0))


async def ask(gang: Gang, caller: str = "") -> list[Any]:
    return [report async for report in gang.generate(REQUEST, caller)]


async def settled(gang: Gang) -> str:
    """Let all that is pending happen; return what the gang reports."""
    for _ in range(50):
        await asyncio.sleep(0)
    return str(gang.record_routing_stats()["now"]["trouble"])
