"""Tiles shared out over ranks: rank 0 has the picture that the VAE's own tiled decode makes on one process."""

import weakref
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)

from sp_core import collectives
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.models.vaes import SHARED
from sp_core.tile_parallel import HandOverFailed, PeerTileFailed, TileParallelVAE, TilesHandedOver, can_tile
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from workers.demo_models.pipelines import demo_of

CAUSAL = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
LTX = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "patch_size": 1,
    "spatio_temporal_scaling": (True, True, False, False),
    "encoder_causal": True,
    "decoder_causal": False,
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "timestep_conditioning": False,
    "decoder_inject_noise": (False, False, False, False, False),
    "upsample_residual": (False, False, False, False),
    "upsample_factor": (1, 1, 1, 1),
    "patch_size_t": 1,
}
PLAIN = {
    "block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip


DEMOS = {
    "dc": ("sana", "SanaPipeline"),
    "hunyuan-image": ("hunyuan_image", "HunyuanImagePipeline"),
    "hunyuan-video": ("hunyuan_video", "HunyuanVideoPipeline"),
    "hunyuan-video-15": ("hunyuan_video_15", "HunyuanVideo15Pipeline"),
}
"""The VAEs of demo models."""

REFINER = ("hunyuan_image", "HunyuanImageRefinerPipeline")

NAMES = ("qwen-image", "wan", "ltx", "kl", "flux-2", *DEMOS)


def vae_of_demo(family: str, pipeline: str) -> tuple[Any, torch.Tensor]:
    """The VAE of a demo model with tiles of 4x4 latents, 3 apart, and latents of several."""
    made = demo_of(family, pipeline).vae
    ratio = made.config.get("spatial_compression_ratio") or made.spatial_compression_ratio
    for side in ("height", "width", "size"):
        for attribute, value in (("sample_min", 4 * ratio), ("latent_min", 4), ("sample_stride", 3 * ratio)):
            if hasattr(made, f"tile_{attribute}_{side}"):
                setattr(made, f"tile_{attribute}_{side}", value)
    frames = () if isinstance(made, AutoencoderDC | AutoencoderKLHunyuanImage) else (3,)
    shape = (1, made.config.latent_channels, *frames, 6, 7)
    return made.eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))


def vae(name: str) -> tuple[Any, torch.Tensor]:
    """A tiny VAE that cuts these latents into several tiles."""
    if name in DEMOS:
        return vae_of_demo(*DEMOS[name])
    torch.manual_seed(0)
    frames = 1
    small = {"tile_sample_min_height": 32, "tile_sample_min_width": 32}
    strides = {"tile_sample_stride_height": 24, "tile_sample_stride_width": 24}
    if name == "qwen-image":
        made = AutoencoderKLQwenImage(**CAUSAL)
    elif name == "wan":
        made, frames = AutoencoderKLWan(**CAUSAL), 3
    elif name == "ltx":
        made = AutoencoderKLLTXVideo(**LTX)
        made.use_framewise_decoding, frames = True, 5
        small |= {"tile_sample_min_num_frames": 8, "tile_sample_stride_num_frames": 4}
    else:
        kind = AutoencoderKLFlux2 if name == "flux-2" else AutoencoderKL
        made, strides, small = kind(**PLAIN), {}, {"tile_sample_min_size": 16, "tile_latent_min_size": 8}
    for attribute, value in (small | strides).items():
        assert hasattr(made, attribute), attribute
        setattr(made, attribute, value)
    shape = (2, 4, 9, 14) if made.__class__ in (AutoencoderKL, AutoencoderKLFlux2) else (1, 4, frames, 9, 14)
    return made.eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))


def decoded(mesh: ParallelMesh, name: str, blanked: bool = False) -> tuple[torch.Tensor | None, int]:
    """What this rank gets, and how often its decoder ran."""
    made, latents = vae(name)
    forward, runs = type(made.decoder).forward, 0

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal runs
        runs += 1
        output: torch.Tensor = forward(*args, **kwargs)
        return output

    gather = collectives.gather
    last = mesh.axis("gang").rank == mesh.axis("gang").size - 1
    blank = (lambda tensors, axis: gather([t * 0 for t in tensors], axis)) if blanked and last else gather
    counted = mock.patch.object(type(made.decoder), "forward", count)
    with torch.no_grad(), counted, mock.patch.object(collectives, "gather", blank):
        try:
            return TileParallelVAE(made, mesh).decode(latents, return_dict=False)[0], runs
        except TilesHandedOver:
            return None, runs
        finally:
            assert not made.use_tiling


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_shared_tiles_are_the_tiles_of_one_process(ranks: RankPool, name: str, size: int) -> None:
    made, latents = vae(name)
    with torch.no_grad():
        whole = made.decode(latents, return_dict=False)[0]
        made.use_tiling = True
        reference = made.decode(latents, return_dict=False)[0]
    assert error(whole, reference) > 100 * BAR  # so there are tiles
    ((alone, total),) = ranks.run(ParallelDegrees(), decoded, name)
    assert error(alone, reference) <= BAR
    found = ranks.run(ParallelDegrees(ulysses_degree=size), decoded, name)
    assert error(found[0][0], reference) <= BAR
    assert [picture for picture, _ in found[1:]] == [None] * (size - 1)
    assert sum(runs for _, runs in found) == total
    assert max(runs for _, runs in found) < total


def test_all_classes_that_share_are_tried() -> None:
    assert {type(vae(name)[0]).__name__ for name in NAMES} == SHARED


def test_a_vae_that_tiles_wrongly_does_not_tile() -> None:
    """If this fails, diffusers has been mended: then take the class out of `WRONG_TILES`."""
    made, latents = vae_of_demo(*REFINER)
    assert not can_tile(made) and can_tile(vae("kl")[0]) and not can_tile(None)
    with torch.no_grad():
        whole = made.decode(latents, return_dict=False)[0]
        made.use_tiling = True
        assert made.decode(latents, return_dict=False)[0].shape != whole.shape


def test_tiles_of_the_other_rank_matter(ranks: RankPool) -> None:
    made, latents = vae("wan")
    made.use_tiling = True
    with torch.no_grad():
        reference = made.decode(latents, return_dict=False)[0]
    found = ranks.run(ParallelDegrees(ulysses_degree=2), decoded, "wan", True)
    assert error(found[0][0], reference) > 100 * BAR


def failing(mesh: ParallelMesh) -> str:
    made, latents = vae("kl")
    if mesh.axis("gang").rank == 1:
        made.decoder.conv_in.forward = mock.Mock(side_effect=MemoryError("no room"))
    try:
        with torch.no_grad():
            TileParallelVAE(made, mesh).decode(latents)
    except (PeerTileFailed, MemoryError) as error:
        assert made.decoder is not None
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_all_ranks_learn_that_one_failed(ranks: RankPool) -> None:
    assert ranks.run(ParallelDegrees(ring_degree=3), failing) == [
        "PeerTileFailed: another rank could not decode its tiles",
        "MemoryError: no room",
        "PeerTileFailed: another rank could not decode its tiles",
    ]


def twice(mesh: ParallelMesh) -> list[torch.Tensor]:
    """What this rank gets where a pipeline decodes in two parts."""
    made, latents = vae("kl")
    shared, parts = TileParallelVAE(made, mesh), []
    with torch.no_grad():
        with suppress(TilesHandedOver):
            for _ in range(2):
                parts.append(shared.decode(latents, return_dict=False)[0])
        shared = shared.for_another_call()
        with suppress(TilesHandedOver):
            parts.append(shared.decode(latents, return_dict=False)[0])
    return parts


def test_rank_0_decodes_later_parts_of_a_call_alone(ranks: RankPool) -> None:
    """The others have ended their call, and would not answer."""
    made, latents = vae("kl")
    made.use_tiling = True
    with torch.no_grad():
        reference = made.decode(latents, return_dict=False)[0]
    found = ranks.run(ParallelDegrees(ulysses_degree=2), twice)
    assert [error(part, reference) <= BAR for part in found[0]] == [True] * 3
    assert found[1] == []


def caches(mesh: ParallelMesh) -> int:
    """How many tiles of this rank have their cache at once, at most."""
    made, latents = vae("wan")
    forward, most = type(made.decoder).forward, 0
    kept: dict[int, weakref.ref[torch.Tensor]] = {}

    def see(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal most
        output: torch.Tensor = forward(*args, **kwargs)
        cache = kwargs["feat_cache"]
        kept[id(cache)] = weakref.ref(next(each for each in cache if isinstance(each, torch.Tensor)))
        most = max(most, sum(each() is not None for each in kept.values()))
        return output

    with torch.no_grad(), mock.patch.object(type(made.decoder), "forward", see), suppress(TilesHandedOver):
        TileParallelVAE(made, mesh).decode(latents)
    assert len(kept) > 1
    return most


def test_a_rank_keeps_the_cache_of_one_tile(ranks: RankPool) -> None:
    assert ranks.run(ParallelDegrees(ulysses_degree=2), caches) == [1, 1]


def not_sent(mesh: ParallelMesh) -> str:
    made, latents = vae("kl")
    gather = mock.Mock(side_effect=MemoryError("no room"))
    with torch.no_grad(), mock.patch.object(collectives, "gather", gather), pytest.raises(HandOverFailed) as failed:
        TileParallelVAE(made, mesh).decode(latents)
    return str(failed.value)


def test_tiles_that_do_not_arrive_lose_all_ranks(ranks: RankPool) -> None:
    """The others have sent theirs, and nobody takes them: their next collective would not be the same as here."""
    said = ranks.run(ParallelDegrees(ulysses_degree=2), not_sent)
    assert said == [f"rank {rank}: MemoryError: no room" for rank in range(2)]
