"""LTX-Video from 0.9.1 on: a decoder that takes a timestep and adds noise to what it decodes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo

from deploy.model_spec import ModelSpec
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.fake_cuda.guard import needs_guard
from tests.support.fake_cuda.request import draw, draw_on_pretended_cuda
from tests.workers.test_shared_tiles import drawn
from workers.demo_models.classic.ltx import demo_pipeline
from workers.demo_models.parts import LATENT_CHANNELS
from workers.demo_models.pipelines import requests_of
from workers.model.decoder_noise import fix_noise
from workers.pipeline_proof import answer, apart, classic_answer

TOLD = {"decode_timestep": 0.05, "decode_noise_scale": 0.3}


def conditioned() -> AutoencoderKLLTXVideo:
    config = {name: value for name, value in demo_pipeline().vae.config.items() if not name.startswith("_")}
    config |= {"decoder_inject_noise": (True,) * 5, "timestep_conditioning": True}
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(**config).eval()
    for name, parameter in vae.named_parameters():
        if "per_channel_scale" in name:
            parameter.data.fill_(0.5)
    return vae


@pytest.fixture(scope="module", params=["LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each pipeline with this VAE."""
    folder: Path = tmp_path_factory.mktemp("noise") / request.param
    pipeline = demo_pipeline(request.param)
    pipeline.register_modules(vae=conditioned())
    pipeline.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_the_noise_of_a_decoder_is_the_same_each_time() -> None:
    vae: Any = conditioned()
    latents, timestep = torch.randn(1, LATENT_CHANNELS, 2, 2, 3), torch.tensor([0.05])

    def decoded(of: torch.Tensor = latents) -> torch.Tensor:
        made: torch.Tensor = vae.decode(of, timestep).sample
        return made

    assert not torch.equal(decoded(), decoded())  # as diffusers has it
    fix_noise(vae)
    first = decoded()
    torch.randn(7)
    assert torch.equal(decoded(), first)
    for name, parameter in vae.named_parameters():
        if "per_channel_scale" in name:
            parameter.data.zero_()
    assert not torch.equal(decoded(), first)


def test_each_of_several_is_what_its_seed_makes_alone_on_every_layout(demo: Path, ranks: RankPool) -> None:
    given, *_ = requests_of(demo.name)
    request = replace(given, n=2, extra_params={**given.extra_params, **TOLD})
    ((both, _),) = ranks.run(ParallelDegrees(), drawn, demo, request)
    ((again, _),) = ranks.run(ParallelDegrees(), drawn, demo, request)
    ((second, _),) = ranks.run(ParallelDegrees(), drawn, demo, replace(request, n=1, seed=request.all_seeds[1]))
    shared, _ = ranks.run(ParallelDegrees(ulysses_degree=2), drawn, demo, request)
    assert len(both) == 2
    assert apart(again, both) == 0
    assert apart(second, both[1:]) <= 1
    assert apart(shared[0], both) <= 1
    ((other, _),) = ranks.run(ParallelDegrees(), drawn, demo, replace(request, extra_params=given.extra_params))
    assert apart(other, both) > 1  # else the decode's own timestep and noise would not matter


def test_it_is_what_the_classic_call_makes(demo: Path) -> None:
    given, *_ = requests_of(demo.name)
    request = replace(given, extra_params={**given.extra_params, **TOLD})
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    (latents, made), (reference, expected) = (
        answer(mesh, demo, request),
        classic_answer(mesh, demo.name, demo, request),
    )
    assert error(latents, reference) <= BAR
    assert apart(made, expected) <= 1


@needs_guard
def test_a_gpu_draws_from_the_seeds_of_the_cpu(demo: Path) -> None:
    """The call of `LTXImageToVideoPipeline` draws by itself, which torch refuses from a generator on the CPU."""
    *_, given = requests_of(demo.name)
    request = replace(given, extra_params={**given.extra_params, **TOLD})
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    spec = ModelSpec(name="demo", source=str(demo), device="cpu")
    made, _ = draw_on_pretended_cuda(mesh, spec, request)
    for found, expected in zip(made, draw(mesh, spec, request), strict=True):
        assert abs(found - expected).max() <= 1
