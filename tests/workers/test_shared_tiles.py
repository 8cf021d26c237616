"""Requests so large that ranks share the tiles of the decode, through the pipelines' own calls.

A VAE may keep frames between two calls of its decoder, and a call may decode in several parts. Whatever they do, the
ranks make what one of them makes.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import LattePipeline
from PIL import Image

from deploy.model_spec import ModelSpec
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.tile_parallel import can_share
from sp_core.verify.rank_pool import RankPool
from workers.demo_models.pipelines import requests_of, served
from workers.demo_models.writer import write_demo_model
from workers.messages import GenerationRequest
from workers.model.classic_denoising import begin
from workers.model.denoising import Denoising
from workers.model.loader import LoadedModel, load_model
from workers.pipeline_proof import _pixels, apart
from workers.small_pictures import small_pictures

ALONE = {
    "EasyAnimatePipeline",
    "CogVideoXPipeline",
    "CogVideoXImageToVideoPipeline",
    "MochiPipeline",
    "AllegroPipeline",
}
"""Whose first rank decodes alone."""

DECODE_LATENTS = LattePipeline.decode_latents

Frames = list[list[Image.Image]]

SHORT = ("EasyAnimatePipeline", "CogVideoXPipeline", "LattePipeline", "HunyuanVideoPipeline")
"""Frames kept in the layers; frames returned; several decodes of a call; and one whose tiles are shared."""

SOAK = ("MochiPipeline", "SanaPipeline", "HunyuanVideo15Pipeline", "HunyuanImagePipeline", "SkyReelsV2Pipeline",
        "LTXPipeline", "AllegroPipeline", "CogVideoXImageToVideoPipeline")  # fmt: skip


def begun(loaded: LoadedModel, request: GenerationRequest) -> Denoising:
    denoising = begin(loaded, request)
    denoising.encode()
    denoising.share_encoded()
    denoising.prepare()
    while not denoising.done:
        denoising.step()
    denoising.join_pictures()
    return denoising


def decode_few_frames(pipeline: LattePipeline, latents: torch.Tensor, frames: int, **_: int) -> Any:
    """As Latte does with 14 frames at a time; its demo model makes 4."""
    return DECODE_LATENTS(pipeline, latents, frames, decode_chunk_size=3)


def drawn(mesh: ParallelMesh, folder: Path, request: GenerationRequest) -> tuple[Frames, bool]:
    """The frames, on rank 0, and whether ranks can share the tiles of this VAE."""
    spec = ModelSpec(name="demo", source=str(folder), device="cpu", parallel=mesh.degrees, vae_tiling_above=1)
    loaded = load_model(spec, mesh)
    with small_pictures(folder), mock.patch.object(LattePipeline, "decode_latents", decode_few_frames):
        made = begun(loaded, request).finish()
    return [_pixels(each) for each in made], can_share(loaded.pipeline.vae)


@pytest.mark.parametrize("pipeline", [*SHORT, *(pytest.param(each, marks=pytest.mark.soak) for each in SOAK)])
def test_ranks_decode_what_one_decodes(ranks: RankPool, tmp_path: Path, pipeline: str) -> None:
    write_demo_model(tmp_path / "demo", served()[pipeline], pipeline)
    (request, *_) = requests_of(pipeline)
    ((alone, _),) = ranks.run(ParallelDegrees(), drawn, tmp_path / "demo", request)
    (first, shares), (second, _) = ranks.run(ParallelDegrees(ulysses_degree=2), drawn, tmp_path / "demo", request)
    assert apart(first, alone) <= 1
    assert second == []
    assert shares is (pipeline not in ALONE)


def fails_half_way(mesh: ParallelMesh, folder: Path, request: GenerationRequest) -> str:
    """What this rank raises if rank 0 fails after it has the tiles of the first of two calls."""
    spec = ModelSpec(name="demo", source=str(folder), device="cpu", parallel=mesh.degrees, vae_tiling_above=1)
    loaded = load_model(spec, mesh)
    kind, first = type(loaded.pipeline.vae), mesh.axis("gang").rank == 0
    own = kind.decode
    decodes = itertools.chain([own, mock.Mock(side_effect=MemoryError("no room"))], itertools.repeat(own))

    def decode(*args: Any, **kwargs: Any) -> Any:
        return next(decodes)(*args, **kwargs) if first else own(*args, **kwargs)

    with small_pictures(folder):
        denoising = begun(loaded, request)
        with mock.patch.object(kind, "decode", decode):
            try:
                denoising.finish()
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            finally:
                mesh.agree(True)  # as the next request does
    return "nothing was raised"


def test_a_failure_after_the_tiles_were_handed_over_is_that_of_the_request_alone(
    ranks: RankPool, tmp_path: Path
) -> None:
    """The others share the tiles of the next call by then, and would wait for this rank if it stopped."""
    pipeline = "StableDiffusion3Img2ImgPipeline"
    write_demo_model(tmp_path / "demo", served()[pipeline], pipeline)
    (request, *_) = [each for each in requests_of(pipeline) if each.inputs]
    said = ranks.run(ParallelDegrees(ulysses_degree=2), fails_half_way, tmp_path / "demo", replace(request, n=2))
    assert said == ["MemoryError: no room", "nothing was raised"]
