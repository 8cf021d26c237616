"""Adapters come and go while the ranks run: as if the model had been started so, and on all ranks or on none."""

import asyncio
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.model_sections import LoRA
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.deployments import model
from tests.workers.test_denoising import REQUESTS, begun
from workers.errors import GangLost, InvalidParameter, PeerFailed, RequestFailed
from workers.gang.rank import Rank
from workers.gang.rank_group import RankGroup
from workers.model import loader as pipeline
from workers.model.loader import load_model

LAYOUTS = {
    "1 rank": ParallelDegrees(),
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
    "tp 2": ParallelDegrees(tensor_parallel_size=2),
}
PLAIN = REQUESTS["even"]
INKED = replace(PLAIN, loras=(("ink", 0.8),))


@pytest.fixture(scope="module")
def chalk(ink: LoRA, tmp_path_factory: pytest.TempPathFactory) -> LoRA:
    """Another adapter under the name of the first."""
    file = tmp_path_factory.mktemp("loras") / "chalk.safetensors"
    save_file({name: tensor.flip(0).contiguous() for name, tensor in load_file(ink.source).items()}, file)
    return LoRA(name="ink", source=str(file))


def started(mesh: ParallelMesh, folder: Path, *loras: LoRA) -> Rank:
    """A rank as `Rank.join` leaves it."""
    spec = model(folder, **asdict(mesh.degrees)).model_copy(update={"loras": loras})
    rank = Rank(mesh.axis("gang").rank, spec)
    rank._use(load_model(spec, mesh))
    return rank


def drawn(rank: Rank, request: Any) -> torch.Tensor:
    denoising = begun(rank._loaded, request)
    while not denoising.done:
        denoising.step()
    return denoising.latents


def come_and_go(mesh: ParallelMesh, folder: Path, ink: LoRA, chalk: LoRA) -> dict[str, tuple[torch.Tensor, ...]]:
    """Pairs that must be equal to the bit: what running ranks draw, and what ranks draw that were started so."""
    rank = started(mesh, folder)
    plain = drawn(rank, PLAIN)
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    rank.set_loras((ink,))
    found["loaded"] = drawn(rank, INKED), drawn(started(mesh, folder, ink), INKED)
    found["loaded, not asked for"] = drawn(rank, PLAIN), plain
    rank.set_loras((chalk,))
    found["another source"] = drawn(rank, INKED), drawn(started(mesh, folder, chalk), INKED)
    drawn(rank, INKED)  # active when it is unloaded
    rank.set_loras(())
    found["unloaded"] = drawn(rank, PLAIN), plain
    with pytest.raises(InvalidParameter, match="has no adapter 'ink'; it has: none"):
        drawn(rank, INKED)
    assert rank.status().phase == "idle"
    assert rank.model == rank._loaded.spec == model(folder, **asdict(mesh.degrees))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_if_started_so(ranks: RankPool, demo_model: Path, ink: LoRA, chalk: LoRA, layout: str) -> None:
    for found in ranks.run(LAYOUTS[layout], come_and_go, demo_model, ink, chalk):
        for state, (live, fresh) in found.items():
            assert torch.equal(live, fresh), state
        plain = found["unloaded"][1]
        inked, chalked = found["loaded"][0], found["another source"][0]
        for a, b in ((inked, plain), (chalked, plain), (inked, chalked)):
            assert error(a, b) > 100 * BAR


def unreadable(*_: Any) -> None:
    raise OSError("the disk of this rank is gone")


def fail_on_the_last(mesh: ParallelMesh, folder: Path, ink: LoRA, chalk: LoRA) -> tuple[bool, str, str]:
    rank = started(mesh, folder, ink)
    before = drawn(rank, INKED)
    read, me = pipeline.read_lora, mesh.axis("gang")
    if me.rank == me.size - 1:
        pipeline.read_lora = unreadable  # type: ignore[assignment]
    try:
        with pytest.raises(RequestFailed) as failed:
            rank.set_loras((chalk,))
    finally:
        pipeline.read_lora = read
    assert rank.model.loras == rank._loaded.spec.loras == (ink,)
    assert rank.status().phase == "idle"
    same = torch.equal(drawn(rank, INKED), before)
    rank.set_loras((chalk,))  # and the gang is sound
    return same and not torch.equal(drawn(rank, INKED), before), type(failed.value).__name__, str(failed.value)


@pytest.mark.parametrize("layout", ["1 rank", "ulysses 2"])
def test_all_ranks_or_none(ranks: RankPool, demo_model: Path, ink: LoRA, chalk: LoRA, layout: str) -> None:
    *others, (kept, kind, said) = ranks.run(LAYOUTS[layout], fail_on_the_last, demo_model, ink, chalk)
    last = LAYOUTS[layout].world_size - 1
    assert (kept, kind, said) == (True, "RequestFailed", f"rank {last}: OSError: the disk of this rank is gone")
    assert [(kept, kind) for kept, kind, _ in others] == [(True, PeerFailed.__name__)] * last


def warm_up_fails(mesh: ParallelMesh, folder: Path, ink: LoRA) -> bool:
    rank = started(mesh, folder)

    def fails(_: Any) -> None:
        raise RequestFailed("as all ranks agree")

    rank._warm_up_adapters = fails  # type: ignore[method-assign]
    with pytest.raises(RequestFailed, match="as all ranks agree"):
        rank.set_loras((ink,))
    return rank.model.loras == () and all(adapters.names == [] for adapters in rank._loaded.adapters.values())


def test_an_adapter_that_cannot_be_warmed_up(ranks: RankPool, demo_model: Path, ink: LoRA) -> None:
    assert ranks.run(LAYOUTS["ulysses 2"], warm_up_fails, demo_model, ink) == [True, True]


def wrong_lists(mesh: ParallelMesh, folder: Path, ink: LoRA) -> list[str]:
    said, rank = [], started(mesh, folder)
    for loras in (
        (ink, LoRA(name="ink", source=f"{Path(ink.source).parent}/./ink.safetensors")),
        (ink, LoRA(name="pencil", source="/nowhere.safetensors")),
    ):
        with pytest.raises(RequestFailed) as failed:
            rank.set_loras(loras)
        said.append(str(failed.value))
    return said


def test_mistakes_are_named(ranks: RankPool, demo_model: Path, ink: LoRA) -> None:
    ((twice, absent),) = ranks.run(LAYOUTS["1 rank"], wrong_lists, demo_model, ink)
    assert "two files have weights for transformer under the name 'ink'" in twice
    assert "no file /nowhere.safetensors" in absent


def test_a_transformer_that_the_model_does_not_have(demo_models: dict[str, Path], ink: LoRA, tmp_path: Path) -> None:
    """Not every Wan has the second one that diffusers' pipeline knows."""
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    loaded = load_model(model(demo_models["wan"]), mesh)
    weights = loaded.pipeline.transformer.blocks[0].attn1.to_q.weight
    name = "transformer.blocks.0.attn1.to_q.lora_"
    save_file({f"{name}A.weight": weights[:2].clone(), f"{name}B.weight": weights[:, :2].clone()}, tmp_path / "a")
    second = LoRA(name="a", source=str(tmp_path / "a"), component="transformer_2")
    assert list(loaded.with_loras((second,)).shares[second]) == ["transformer_2"]
    del loaded.adapters["transformer_2"]
    with pytest.raises(ValueError, match="is for transformer_2, which the model does not have; set component"):
        loaded.with_loras((second,))


class FakeRank:
    """As far as `RankGroup.set_loras` calls it: answers at once, or when told to."""

    def __init__(self, error: Exception | None = None, may: asyncio.Event | None = None) -> None:
        self.set_loras, self.error, self.may, self.answered = self, error, may, False

    async def remote(self, _: tuple[LoRA, ...]) -> None:
        if self.may is not None:
            await self.may.wait()
        self.answered = True
        if self.error:
            raise self.error


def group_of(ranks: list[FakeRank], monkeypatch: pytest.MonkeyPatch) -> RankGroup:
    group = RankGroup(model(Path("/nowhere")), ranks, [], {}, on_lost=lambda kind: None)
    monkeypatch.setattr(group, "_lose", lambda kind, reason, rank: group._losses.lose(rank, reason))
    return group


def test_the_gang_hears_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [FakeRank(PeerFailed("another")), FakeRank(PeerFailed("another")), FakeRank(RequestFailed("no file"))]
    for ranks in (failed, failed[::-1]):  # whether it comes last or first
        with pytest.raises(RequestFailed, match="no file"):
            asyncio.run(group_of(ranks, monkeypatch).set_loras(()))
    group = group_of([FakeRank(may=asyncio.Event()), FakeRank(RuntimeError("a broken collective"))], monkeypatch)
    with pytest.raises(GangLost, match="demo: RuntimeError: a broken collective"):
        asyncio.run(group.set_loras(()))


def test_a_caller_that_leaves_leaves_no_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    may = asyncio.Event()
    ranks = [FakeRank(may=may), FakeRank(may=may)]

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(group_of(ranks, monkeypatch).set_loras(()), 0.05)
        may.set()
        async with asyncio.timeout(60):
            while not all(rank.answered for rank in ranks):
                await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert all(rank.answered for rank in ranks)
