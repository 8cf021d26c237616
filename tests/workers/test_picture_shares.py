"""Several pictures are decoded on all ranks that have the VAE: rank 0 has the pixels that one rank makes."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from sp_core import collectives
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.tile_parallel import HandOverFailed
from sp_core.verify.rank_pool import RankPool
from tests.support.deployments import model
from tests.workers.test_denoising import begun, pixels
from workers.errors import OutOfMemory, PeerFailed
from workers.gang.rank import Rank
from workers.messages import Drawn, GenerationRequest
from workers.model.denoising import Denoising
from workers.model.loader import load_model
from workers.model.picture_shares import decode_shared

ALONE = ParallelDegrees()

Decoded = tuple[list[np.ndarray[Any, Any]], int]


def request(n: int, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        "a", "demo", "a cup of coffee", width=64, height=48, num_inference_steps=1, seed=3, n=n, **fields
    )


def noise(asked: GenerationRequest, shape: torch.Size) -> torch.Tensor:
    """Latents to decode: the same on every layout, to the bit, which denoised ones are not."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(asked.seed))


def decode(mesh: ParallelMesh, folder: Path, asked: GenerationRequest, vae: str, swapped: bool = False) -> Decoded:
    """The pictures on this rank, and how many its VAE made. With `swapped` the last rank hands over other pixels."""
    spec = model(folder, **asdict(mesh.degrees)).model_copy(update={"vae": vae})
    loaded = load_model(spec, mesh)
    denoising, made = begun(loaded, asked), 0
    denoising.step()
    denoising.join_pictures()
    denoising._loop_state.latents = noise(asked, denoising.latents.shape)
    run = Denoising._decode

    def count(self: Denoising, latents: torch.Tensor) -> list[Any]:
        nonlocal made
        made += len(latents)
        return run(self, latents)

    gather, last = collectives.gather, mesh.axis("gang").rank == mesh.axis("gang").size - 1
    other = mock.patch.object(collectives, "gather", lambda tensors, axis: gather([255 - t for t in tensors], axis))
    with mock.patch.object(Denoising, "_decode", count), other if swapped and last else nullcontext():
        return [pixels(each) for each in denoising.finish()], made


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_rank_0_has_the_pixels_of_one_rank(ranks: RankPool, demo_model: Path, n: int, world: int) -> None:
    ((alone, total),) = ranks.run(ALONE, decode, demo_model, request(n), "all")
    assert total == len(alone) == n
    found = ranks.run(ParallelDegrees(ulysses_degree=world), decode, demo_model, request(n), "all")
    assert [made for _, made in found] == [len(range(rank, n, world)) for rank in range(world)]
    for one, other in zip(found[0][0], alone, strict=True):
        assert np.array_equal(one, other)
    assert [drawn for drawn, _ in found[1:]] == [[]] * (world - 1)
    assert all(np.abs(alone[0] - each).max() > 100 for each in alone[1:])  # so the order matters


@pytest.mark.parametrize("layout", [ParallelDegrees(cfg_parallel_size=2), ParallelDegrees(ring_degree=2)], ids=str)
def test_on_other_axes_too(ranks: RankPool, demo_model: Path, layout: ParallelDegrees) -> None:
    ((alone, _),) = ranks.run(ALONE, decode, demo_model, request(3), "all")
    found = ranks.run(layout, decode, demo_model, request(3), "all")
    assert [made for _, made in found] == [2, 1]
    assert all(np.array_equal(one, other) for one, other in zip(found[0][0], alone, strict=True))


@pytest.mark.parametrize("family", ["z-image", "wan", "flux"])
def test_of_every_family(ranks: RankPool, demo_models: dict[str, Path], family: str) -> None:
    asked = request(2, **({"num_frames": 5, "output_format": "mp4"} if family == "wan" else {}))
    ((alone, _),) = ranks.run(ALONE, decode, demo_models[family], asked, "all")
    found = ranks.run(ParallelDegrees(ulysses_degree=2), decode, demo_models[family], asked, "all")
    assert [made for _, made in found] == [1, 1]
    assert all(np.array_equal(one, other) for one, other in zip(found[0][0], alone, strict=True))
    assert alone[0].ndim == (4 if family == "wan" else 3)


def test_the_picture_of_the_other_rank_matters(ranks: RankPool, demo_model: Path) -> None:
    """The control: where one rank hands over other pixels, those of its pictures differ and no others."""
    ((alone, _),) = ranks.run(ALONE, decode, demo_model, request(3), "all")
    drawn, _ = ranks.run(ParallelDegrees(ulysses_degree=2), decode, demo_model, request(3), "all", True)[0]
    assert [int(np.abs(one - other).max()) > 100 for one, other in zip(drawn, alone, strict=True)] == [
        False,
        True,
        False,
    ]


def test_where_only_rank_0_has_the_vae_it_decodes_all(ranks: RankPool, demo_model: Path) -> None:
    ((alone, _),) = ranks.run(ALONE, decode, demo_model, request(3), "all")
    found = ranks.run(ParallelDegrees(ulysses_degree=2), decode, demo_model, request(3), "rank0")
    assert [made for _, made in found] == [3, 0]
    assert all(np.array_equal(one, other) for one, other in zip(found[0][0], alone, strict=True))


def fail_on_the_last(mesh: ParallelMesh, folder: Path) -> tuple[str, str, bool]:
    """What each rank raises where the last has too little memory, and whether it draws the next request."""
    spec = model(folder, **asdict(mesh.degrees))
    rank = Rank(mesh.axis("gang").rank, spec)
    rank._use(load_model(spec, mesh))
    run, last = Denoising._decode, mesh.axis("gang").rank == mesh.axis("gang").size - 1

    def run_dry(*_: Any) -> list[Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        mock.patch.object(Denoising, "_decode", run_dry if last else run),
        pytest.raises((OutOfMemory, PeerFailed)) as e,
    ):
        list(rank.generate(request(3)))
    assert not isinstance(e.value, OutOfMemory) or e.value.agreed
    drawn = any(isinstance(report, Drawn) for report in rank.generate(request(3)))
    return type(e.value).__name__, str(e.value), drawn


def test_all_ranks_learn_that_one_failed_and_go_on(ranks: RankPool, demo_model: Path) -> None:
    first, second, last = ranks.run(ParallelDegrees(ulysses_degree=3), fail_on_the_last, demo_model)
    assert first == ("PeerFailed", "rank 0 stopped because another rank could not decode its pictures", True)
    assert second == ("PeerFailed", "rank 1 stopped because another rank could not decode its pictures", False)
    assert last == (
        "OutOfMemory",
        "'demo' has too little memory for 64x48, n=3: ask for fewer pixels, frames or pictures",
        False,
    )


def test_what_is_not_agreed_is_not_said_to_be(demo_model: Path) -> None:
    """Others wait for a rank that has no room for their pictures: it must not say that all have failed together."""
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)

    def no_room(*_: Any) -> None:
        raise MemoryError

    def finish() -> list[Any]:
        with mock.patch("workers.model.picture_shares.collectives.gather", no_room):
            return decode_shared(lambda _: Image.new("RGB", (4, 2)), 2, mesh)

    with pytest.raises(HandOverFailed, match="MemoryError") as failed:
        Rank(0, model(demo_model))._finish(SimpleNamespace(finish=finish))  # type: ignore[arg-type]
    assert isinstance(failed.value.__cause__, MemoryError)


def hand_over(mesh: ParallelMesh, count: int) -> list[Any]:
    made = decode_shared(lambda i: [Image.new("RGB", (4, 2), (i, 0, 9))] * 3, count, mesh)
    return [(len(frames), frames[0].size, frames[0].getpixel((0, 0))) for frames in made]


def test_fewer_videos_than_ranks(ranks: RankPool) -> None:
    videos = [(3, (4, 2), (i, 0, 9)) for i in range(2)]
    assert ranks.run(ParallelDegrees(ring_degree=4), hand_over, 2) == [videos, [], [], []]


def test_a_hand_over_without_memory_is_no_reason_to_try_another_gang(demo_model: Path) -> None:
    """These ranks are lost, and those of any other gang would be."""

    def fails(*_: Any) -> Iterator[Any]:
        try:
            raise MemoryError("no room")
        except MemoryError as error:
            raise HandOverFailed("rank 0: MemoryError: no room") from error
        yield

    rank = Rank(0, model(demo_model, ulysses_degree=2))
    with mock.patch.object(Rank, "_generate", fails), pytest.raises(OutOfMemory, match="ask for fewer") as told:
        list(rank.generate(request(2)))
    assert not told.value.agreed
