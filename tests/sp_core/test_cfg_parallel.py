"""Guidance on separate groups: every guider combines what one process would, whatever the number of branches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    TangentialClassifierFreeGuidance,
)

from sp_core.cfg_parallel import ParallelGuider
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR

GUIDERS: dict[str, Any] = {
    "plain": (ClassifierFreeGuidance, {"guidance_scale": 4.0}),
    "rescaled": (ClassifierFreeGuidance, {"guidance_scale": 4.0, "guidance_rescale": 0.7}),
    "original": (ClassifierFreeGuidance, {"guidance_scale": 4.0, "use_original_formulation": True}),
    "from the third step on": (ClassifierFreeGuidance, {"guidance_scale": 4.0, "start": 0.5}),
    "off": (ClassifierFreeGuidance, {"enabled": False}),
    "zero star": (ClassifierFreeZeroStarGuidance, {"guidance_scale": 4.0}),
    "projected, with momentum": (AdaptiveProjectedGuidance, {"adaptive_projected_guidance_momentum": -0.5}),
    "tangential": (TangentialClassifierFreeGuidance, {"guidance_scale": 4.0}),
}  # fmt: skip


class ThreeBranches:
    """A guider of three branches, of which the second is evaluated without its prompt when its turn is known."""

    def __init__(self) -> None:
        self._count_prepared = 0

    def set_state(self, **state: Any) -> None:
        self._count_prepared = 0

    def prepare_inputs(self, data: Any) -> list[Any]:
        return [SimpleNamespace(prompt=prompt) for prompt in data["prompt"]]

    def prepare_models(self, denoiser: Any) -> None:
        self._count_prepared += 1
        denoiser.branch = self._count_prepared

    def cleanup_models(self, denoiser: Any) -> None:
        denoiser.branch = None

    def __call__(self, data: list[Any]) -> Any:
        first, second, third = (branch.noise_pred for branch in data)
        return SimpleNamespace(pred=first + 3 * (first - second) + 5 * (second - third))


def denoise(guider: Any) -> tuple[torch.Tensor, int]:
    """Four steps of something like a model, as diffusers' loops use a guider; and how often the model ran."""
    prompts = tuple(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    latents, runs, denoiser = torch.ones(2, 6, 4), 0, SimpleNamespace(branch=None)
    for step in range(4):
        guider.set_state(step=step, num_inference_steps=4, timestep=torch.tensor(step))
        branches = guider.prepare_inputs({"prompt": prompts})
        for branch in branches:
            guider.prepare_models(denoiser)
            shift = denoiser.branch or 0
            branch.noise_pred = torch.sin(latents * branch.prompt + step) + shift
            runs += 1
            guider.cleanup_models(denoiser)
        latents = latents - 0.1 * guider(branches).pred
    return latents, runs


def make(name: str) -> Any:
    if name == "three branches":
        return ThreeBranches()
    kind, options = GUIDERS[name]
    return kind(**options)


def on_rank(mesh: ParallelMesh, name: str, swapped: bool = False) -> tuple[torch.Tensor, int]:
    guider = ParallelGuider(make(name), mesh.axis("cfg"))
    if swapped:  # the negative control: each group takes the branch of the other
        share = guider._share
        guider._share = lambda branches: share(branches[::-1])  # type: ignore[method-assign]
    return denoise(guider)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", [*GUIDERS, "three branches"])
def test_every_guider_combines_the_same(ranks: RankPool, name: str, size: int) -> None:
    reference, runs = denoise(make(name))
    for latents, own_runs in ranks.run(ParallelDegrees(cfg_parallel_size=size), on_rank, name):
        assert error(latents, reference) <= BAR
        assert own_runs <= runs
    if name == "plain":
        assert own_runs * 2 == runs


def test_another_branch_would_be_seen(ranks: RankPool) -> None:
    reference, _ = denoise(make("three branches"))
    for latents, _ in ranks.run(ParallelDegrees(cfg_parallel_size=3), on_rank, "three branches", True):
        assert error(latents, reference) > 100 * BAR
