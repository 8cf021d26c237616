"""Law 1 on whole requests, without Ray: latents and pixels of a seed are one process's on every Ulysses degree."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

from sp_core.degrees import ParallelDegrees
from sp_core.divergence import error
from sp_core.mesh import ParallelMesh
from sp_core.rank_pool import RankPool
from sp_core.verify import BAR, attention_kept_local
from tests.deployments import model
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest
from workers.pipeline import Denoising, load_pipeline

ALONE = ParallelDegrees()

REQUESTS = {
    "even": GenerationRequest("a", "demo", "a cup of coffee", width=64, height=96, num_inference_steps=6, seed=3),
    "uneven, guided": GenerationRequest(
        "b", "demo", "a fox", width=80, height=112, num_inference_steps=4, seed=4, negative_prompt="blurry", n=2
    ),
}

Generated = tuple[torch.Tensor, list[np.ndarray[Any, Any]]]


def generate(mesh: ParallelMesh, folder: Path, request: GenerationRequest, local: bool = False) -> Generated:
    """Latents and pictures of a request; `local` keeps each rank's attention to its own tokens."""
    pipeline = load_pipeline(model(folder, **asdict(mesh.degrees)), mesh)
    denoising = Denoising(pipeline, request, mesh)
    with attention_kept_local() if local else nullcontext():
        while not denoising.done:
            denoising.step()
    return denoising.latents, [np.asarray(picture, dtype=np.int16) for picture in denoising.finish()]


@pytest.mark.parametrize("name", REQUESTS)
def test_one_rank_is_the_classic_pipeline(demo_model: Path, name: str) -> None:
    request = REQUESTS[name]
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    _, pictures = generate(mesh, demo_model, request)
    classic = QwenImagePipeline.from_pretrained(demo_model)
    expected = classic(
        request.prompt,
        negative_prompt=request.negative_prompt,
        true_cfg_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        num_images_per_prompt=request.n,
        generator=[torch.Generator().manual_seed(request.seed + i) for i in range(request.n)],
    ).images
    assert len(pictures) == len(expected) == request.n
    for picture, reference in zip(pictures, expected, strict=True):
        assert np.abs(picture - np.asarray(reference, dtype=np.int16)).max() <= 1


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", REQUESTS)
def test_every_degree_draws_the_same(ranks: RankPool, demo_model: Path, name: str, world: int) -> None:
    ((latents, pictures),) = ranks.run(ALONE, generate, demo_model, REQUESTS[name])
    for got, drawn in ranks.run(ParallelDegrees(ulysses_degree=world), generate, demo_model, REQUESTS[name]):
        assert error(got, latents) <= BAR
        for picture, reference in zip(drawn, pictures, strict=True):
            assert np.abs(picture - reference).max() <= 1


PRODUCTS = {
    "cfg 2": ParallelDegrees(cfg_parallel_size=2),
    "cfg 3": ParallelDegrees(cfg_parallel_size=3),
    "cfg 2 x ulysses 2": ParallelDegrees(cfg_parallel_size=2, ulysses_degree=2),
    "cfg 2 x ring 2": ParallelDegrees(cfg_parallel_size=2, ring_degree=2),
    "cfg 2 x tp 2": ParallelDegrees(cfg_parallel_size=2, tensor_parallel_size=2),
    "tp 2 x ulysses 2": ParallelDegrees(tensor_parallel_size=2, ulysses_degree=2),
}


@pytest.mark.parametrize("layout", PRODUCTS)
@pytest.mark.parametrize("name", REQUESTS)
def test_every_product_of_axes_draws_the_same(ranks: RankPool, demo_model: Path, name: str, layout: str) -> None:
    ((latents, pictures),) = ranks.run(ALONE, generate, demo_model, REQUESTS[name])
    for got, drawn in ranks.run(PRODUCTS[layout], generate, demo_model, REQUESTS[name]):
        assert error(got, latents) <= BAR
        for picture, reference in zip(drawn, pictures, strict=True):
            assert np.abs(picture - reference).max() <= 1


def test_local_attention_would_be_seen(ranks: RankPool, demo_model: Path) -> None:
    ((latents, pictures),) = ranks.run(ALONE, generate, demo_model, REQUESTS["even"])
    got, drawn = ranks.run(ParallelDegrees(ulysses_degree=2), generate, demo_model, REQUESTS["even"], True)[0]
    assert error(got, latents) > 100 * BAR
    assert np.abs(drawn[0] - pictures[0]).max() > 100


def test_the_prompt_shows(demo_model: Path) -> None:
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    cup = GenerationRequest("a", "demo", "a cup of coffee", width=64, height=64, num_inference_steps=8, seed=1)
    fox = GenerationRequest("b", "demo", "a red fox in the snow", width=64, height=64, num_inference_steps=8, seed=1)
    (_, [first]), (_, [second]) = generate(mesh, demo_model, cup), generate(mesh, demo_model, fox)
    assert np.abs(first - second).mean() > 10


def test_two_requests_do_not_disturb_each_other(demo_model: Path) -> None:
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    pipeline = load_pipeline(model(demo_model), mesh)
    alone, _ = generate(mesh, demo_model, REQUESTS["even"])
    first, second = (Denoising(pipeline, REQUESTS[name], mesh) for name in ("even", "uneven, guided"))
    while not first.done:
        first.step()
        if not second.done:
            second.step()
    assert torch.equal(first.latents, alone)


def test_a_size_that_the_model_cannot_do_is_the_callers_mistake(demo_model: Path) -> None:
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    pipeline = load_pipeline(model(demo_model), mesh)
    request = GenerationRequest("a", "demo", "a cup", width=72, height=64, num_inference_steps=1, seed=0)
    with pytest.raises(InvalidParameter, match="width must be a multiple of 16, got 72"):
        Denoising(pipeline, request, mesh)
