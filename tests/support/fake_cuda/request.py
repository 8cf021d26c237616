"""One request on ranks whose devices are pretended: from the prompt to the picture, as `workers.gang.rank` runs it.

The ranks are real processes and their exchanges are real, over gloo. Groups that NCCL would have are told from those of
hosts, and what is handed to each is checked.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
from torch import nn

from deploy.model_spec import ModelSpec
from sp_core import mesh as mesh_module
from sp_core.mesh import ParallelMesh
from tests.support.fake_cuda.pretend import CUDA, move, pretended
from tests.support.fake_cuda.seen import Seen
from tests.support.fake_cuda.world import device_groups, kernel_chosen
from workers.messages import GenerationRequest
from workers.model.classic_denoising import begin
from workers.model.denoising import Denoising
from workers.model.loader import load_model

Pictures = list[np.ndarray[Any, Any]]

_PICTURE = GenerationRequest(
    "a", "demo", "a cup of coffee", width=96, height=64, num_inference_steps=3, seed=3, guidance_scale=4.0
)
_GUIDED = replace(_PICTURE, negative_prompt="blurry")

REQUESTS: Mapping[str, GenerationRequest] = {
    "qwen-image": _GUIDED,
    "z-image": _PICTURE,
    "wan": replace(_GUIDED, num_frames=5, output_format="mp4"),
    "flux": _PICTURE,
}
"""For the demo model of each family, with guidance of two branches where it has that."""


def draw(mesh: ParallelMesh, spec: ModelSpec, request: GenerationRequest) -> Pictures:
    """The request on plain tensors."""
    return _stages(begin(load_model(spec, mesh), request), mesh, Seen())


def draw_on_pretended_cuda(
    mesh: ParallelMesh, spec: ModelSpec, request: GenerationRequest, seen: Seen | None = None
) -> tuple[Pictures, Seen]:
    """The request on one rank with a pretended GPU, and what was seen; `seen` has it even if the request fails.

    Loading is not part of it: the model is loaded on the CPU and moved.
    """
    with mock.patch.object(mesh_module.dist, "get_backend", lambda _: "nccl"):  # hosts then have groups of their own
        mesh = ParallelMesh.create(mesh.degrees, device_type="cpu", timeout_s=240)
    loaded, seen = load_model(spec, mesh), Seen() if seen is None else seen
    with pretended(seen, device_groups(mesh)), kernel_chosen("torch-cudnn"):
        for part in loaded.pipeline.components.values():
            if isinstance(part, nn.Module):
                move(part)
        mesh.device = CUDA
        seen.phase = "begin"
        pictures = _stages(begin(loaded, request), mesh, seen)
    mesh.close()
    return pictures, seen


def _stages(denoising: Denoising, mesh: ParallelMesh, seen: Seen) -> Pictures:
    for stage in (denoising.encode, denoising.share_encoded, denoising.prepare):
        seen.phase = stage.__name__
        stage()
    with mock.patch.object(Denoising, "step", functools.partialmethod(_step, Denoising.step, seen)):
        for end in denoising.steps(ahead=1):
            if any(mesh.agree(not end.finite)):
                raise RuntimeError(f"the latents are not finite after step {end.step}")
    for stage in (denoising.join_pictures, denoising.finish):
        seen.phase = stage.__name__
        made = stage()
    return [_pixels(each) for each in made or []]


def _step(denoising: Denoising, step: Callable[[Denoising], None], seen: Seen) -> None:
    seen.phase = "first step" if seen.phase == "prepare" else "step"
    step(denoising)


def _pixels(made: Any) -> np.ndarray[Any, Any]:
    """A picture, or the frames of a video."""
    frames = made if isinstance(made, list) else [made]
    return np.stack([np.asarray(frame, dtype=np.int16) for frame in frames])
