"""Law 1 on whole requests, without Ray: latents and pixels of a seed are one process's on every Ulysses degree."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

from deploy.model_sections import LoRA
from sp_core.attention.region_attention import attention_kept_local
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.deployments import model
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest
from workers.model.classic_denoising import begin
from workers.model.denoising import Denoising
from workers.model.loader import LoadedModel, _AbsentVAE, load_model

ALONE = ParallelDegrees()

REQUESTS = {
    "even": GenerationRequest("a", "demo", "a cup of coffee", width=64, height=96, num_inference_steps=6, seed=3),
    "uneven, guided": GenerationRequest(
        "b", "demo", "a fox", width=80, height=112, num_inference_steps=4, seed=4, negative_prompt="blurry", n=2
    ),
}

Generated = tuple[torch.Tensor, list[np.ndarray[Any, Any]]]


def pixels(made: Any) -> np.ndarray[Any, Any]:
    """A picture as `(H, W, 3)`, a video as `(F, H, W, 3)`."""
    frames = made if isinstance(made, list) else [made]
    return np.stack([np.asarray(frame, dtype=np.int16) for frame in frames]).squeeze(0 if len(frames) == 1 else ())


def begun(loaded: LoadedModel, request: GenerationRequest) -> Denoising:
    denoising = begin(loaded, request)
    denoising.encode()
    denoising.share_encoded()
    denoising.prepare()
    return denoising


def generate(
    mesh: ParallelMesh, folder: Path, request: GenerationRequest, local: bool = False, **options: Any
) -> Generated:
    """Latents and pictures of a request; `local` keeps each rank's attention to its own tokens."""
    spec = model(folder, **asdict(mesh.degrees)).model_copy(update=options)
    denoising = begun(load_model(spec, mesh), request)
    with attention_kept_local() if local else nullcontext():
        while not denoising.done:
            denoising.step()
    denoising.join_pictures()
    return denoising.latents, [pixels(made) for made in denoising.finish()]


def generate_with(mesh: ParallelMesh, folder: Path, request: GenerationRequest, options: dict[str, Any]) -> Generated:
    return generate(mesh, folder, request, **options)


def check(found: list[Generated], latents: torch.Tensor, pictures: list[np.ndarray[Any, Any]]) -> None:
    """Every rank has the latents of one process; the first has its pictures, the others none."""
    for rank, (got, drawn) in enumerate(found):
        assert error(got, latents) <= BAR
        assert len(drawn) == (len(pictures) if rank == 0 else 0)
        for picture, reference in zip(drawn, pictures, strict=rank == 0):
            assert np.abs(picture - reference).max() <= 1


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


def test_the_forwards_of_a_guided_step_share_their_modulation(demo_model: Path) -> None:
    loaded = load_model(model(demo_model), ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60))
    calls: list[torch.Tensor] = []
    layers = [each for each in loaded.pipeline.transformer.modules() if "shared" in vars(each)]
    for layer in layers:
        layer[-1].register_forward_hook(lambda _layer, _args, output: calls.append(output))
    denoising = begun(loaded, REQUESTS["uneven, guided"])
    denoising.step()
    denoising.step()
    assert len(calls) == 2 * len(layers) > 0  # two steps; two forwards in each
    assert not torch.equal(calls[0], calls[len(layers)])
    again, last = begun(loaded, REQUESTS["uneven, guided"]), denoising.latents
    again.step()
    again.step()
    assert len(calls) == 2 * len(layers)  # the timesteps are those of the first request
    assert torch.equal(again.latents, last)


def test_a_request_with_an_adapter_takes_no_modulation_of_one_without(demo_model: Path, ink: LoRA) -> None:
    plain, adapted = REQUESTS["even"], replace(REQUESTS["even"], loras=(("ink", 1.0),))
    latents = {}
    for order in ((adapted,), (plain, adapted, plain)):
        mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
        loaded = load_model(model(demo_model).model_copy(update={"loras": (ink,)}), mesh)
        for request in order:
            denoising = begun(loaded, request)
            denoising.step()
            key = (request.loras, len(order))
            assert torch.equal(latents.setdefault(key, denoising.latents), denoising.latents)
    without, alone, after = (latents[key] for key in (((), 3), (adapted.loras, 1), (adapted.loras, 3)))
    assert torch.equal(after, alone)
    assert error(without, alone) > 100 * BAR


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", REQUESTS)
def test_every_degree_draws_the_same(ranks: RankPool, demo_model: Path, name: str, world: int) -> None:
    ((latents, pictures),) = ranks.run(ALONE, generate, demo_model, REQUESTS[name])
    check(ranks.run(ParallelDegrees(ulysses_degree=world), generate, demo_model, REQUESTS[name]), latents, pictures)


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
    check(ranks.run(PRODUCTS[layout], generate, demo_model, REQUESTS[name]), latents, pictures)


@pytest.mark.parametrize("layout", ["cfg 2", "cfg 3", "cfg 2 x ulysses 2"])
def test_groups_share_the_pictures_of_an_unguided_request(ranks: RankPool, demo_model: Path, layout: str) -> None:
    request = replace(REQUESTS["uneven, guided"], negative_prompt=None, n=3, seeds=(4, 9, 2))
    ((latents, pictures),) = ranks.run(ALONE, generate, demo_model, request)
    assert error(latents[1:2], latents[:1]) > 100 * BAR
    check(ranks.run(PRODUCTS[layout], generate, demo_model, request), latents, pictures)


@pytest.mark.parametrize("options", [{"text_encoder": "replicate"}, {"vae": "rank0"}], ids=str)
def test_encoders_and_decoder_on_some_ranks_or_all(ranks: RankPool, demo_model: Path, options: dict[str, str]) -> None:
    request = REQUESTS["uneven, guided"]
    ((latents, pictures),) = ranks.run(ALONE, generate, demo_model, request)
    check(ranks.run(ParallelDegrees(ulysses_degree=2), generate_with, demo_model, request, options), latents, pictures)


def test_a_vae_that_is_not_here_says_in_which_dtype_it_computes_elsewhere(demo_model: Path) -> None:
    """Flux makes the pictures of some ControlNets in it, which no VAE sees."""
    absent: Any = _AbsentVAE(demo_model / "vae", torch.bfloat16, torch.device("cpu"))
    assert absent.dtype is torch.bfloat16


@pytest.mark.parametrize("vae", ["all", "rank0"])
def test_large_pictures_are_decoded_in_tiles(ranks: RankPool, demo_model: Path, vae: str) -> None:
    request = GenerationRequest("a", "demo", "a cup", width=320, height=288, num_inference_steps=1, seed=3)
    tiled = {"vae_tiling_above": 320 * 288 - 1, "vae": vae}
    ((latents, pictures),) = ranks.run(ALONE, generate_with, demo_model, request, tiled)
    ((_, whole),) = ranks.run(ALONE, generate_with, demo_model, request, {"vae_tiling_above": 320 * 288})
    assert np.abs(pictures[0] - whole[0]).max() > 1
    check(ranks.run(ParallelDegrees(ulysses_degree=2), generate_with, demo_model, request, tiled), latents, pictures)


def test_local_attention_would_be_seen(ranks: RankPool, demo_model: Path) -> None:
    ((latents, pictures),) = ranks.run(ALONE, generate, demo_model, REQUESTS["even"])
    got, drawn = ranks.run(ParallelDegrees(ulysses_degree=2), generate, demo_model, REQUESTS["even"], True)[0]
    assert error(got, latents) > 100 * BAR
    assert np.abs(drawn[0] - pictures[0]).max() > 100


def test_adapters_are_those_of_the_request(ranks: RankPool, demo_model: Path, ink: LoRA) -> None:
    request = replace(REQUESTS["uneven, guided"], n=1)
    inked = replace(request, loras=(("ink", 0.7),))
    options = {"loras": (ink,)}
    ((plain, _),) = ranks.run(ALONE, generate_with, demo_model, request, {})
    ((latents, pictures),) = ranks.run(ALONE, generate_with, demo_model, inked, options)
    assert error(latents, plain) > 100 * BAR
    classic = QwenImagePipeline.from_pretrained(demo_model)
    classic.load_lora_weights(ink.source, adapter_name="ink")
    classic.set_adapters("ink", 0.7)
    (expected,) = classic(
        request.prompt, negative_prompt=request.negative_prompt, true_cfg_scale=request.guidance_scale,
        width=request.width, height=request.height, num_inference_steps=request.num_inference_steps,
        generator=torch.Generator().manual_seed(request.seed),
    ).images  # fmt: skip
    assert np.abs(pictures[0] - pixels(expected)).max() <= 1
    for layout in ("tp 2 x ulysses 2", "cfg 2 x ring 2"):
        check(ranks.run(PRODUCTS[layout], generate_with, demo_model, inked, options), latents, pictures)


def test_requests_with_and_without_adapters_do_not_disturb_each_other(demo_model: Path, ink: LoRA) -> None:
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    loaded = load_model(model(demo_model).model_copy(update={"loras": (ink,)}), mesh)
    plain = REQUESTS["even"]
    alone, _ = generate(mesh, demo_model, plain)
    first, second = begun(loaded, plain), begun(loaded, replace(plain, loras=(("ink", 1.0),)))
    while not first.done:
        first.step()
        second.step()
    assert torch.equal(first.latents, alone)
    assert error(second.latents, alone) > 100 * BAR
    with pytest.raises(InvalidParameter, match="no adapter 'pencil'; it has: ink"):
        Denoising(loaded, replace(plain, loras=(("pencil", 1.0),)))


def test_the_prompt_shows(demo_model: Path) -> None:
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    cup = GenerationRequest("a", "demo", "a cup of coffee", width=64, height=64, num_inference_steps=8, seed=1)
    fox = GenerationRequest("b", "demo", "a red fox in the snow", width=64, height=64, num_inference_steps=8, seed=1)
    (_, [first]), (_, [second]) = generate(mesh, demo_model, cup), generate(mesh, demo_model, fox)
    assert np.abs(first - second).mean() > 10


def test_two_requests_do_not_disturb_each_other(demo_model: Path) -> None:
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    loaded = load_model(model(demo_model), mesh)
    alone, _ = generate(mesh, demo_model, REQUESTS["even"])
    first, second = (begun(loaded, REQUESTS[name]) for name in ("even", "uneven, guided"))
    while not first.done:
        first.step()
        if not second.done:
            second.step()
    assert torch.equal(first.latents, alone)


def test_a_picture_of_another_size_comes_with_a_warning(demo_model: Path) -> None:
    """Some pipelines choose the size by themselves."""
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    denoising = begun(load_model(model(demo_model), mesh), REQUESTS["even"])
    while not denoising.done:
        denoising.step()
    denoising.finish()
    assert denoising.warnings == ()
    denoising._accepted = replace(denoising.request, width=8)
    denoising.finish()
    assert [each.partition(",")[2] for each in denoising.warnings] == [f" not 8x{denoising.request.height}"]


def test_a_size_that_the_model_cannot_do_is_the_callers_mistake(demo_model: Path) -> None:
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    loaded = load_model(model(demo_model), mesh)
    request = GenerationRequest("a", "demo", "a cup", width=72, height=64, num_inference_steps=1, seed=0)
    with pytest.raises(InvalidParameter, match="width must be a multiple of 16, got 72"):
        Denoising(loaded, request)
