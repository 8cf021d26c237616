"""The demo models are worth testing with: diffusers' own pipelines run them, and what is asked shows in the pixels."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from tests.support.families import tried
from workers.demo_models.writer import write_demo_model

SHOWN = (
    "bria", "chroma", "flux", "flux-2", "hunyuan-video", "ltx", "ovis-image", "qwen-image", "stable-diffusion-3", "wan",
    "z-image",
)  # fmt: skip
"""Of the others, the proofs show that their attention matters; in some of them the prompt hardly does."""

SIZE = {"width": 64, "height": 48, "num_inference_steps": 6, "output_type": "np"}
FAMILY_SIZE: dict[str, dict[str, Any]] = {
    "wan": {"num_frames": 9},
    "ltx": {"num_frames": 9, "height": 64},
    "hunyuan-video": {"num_frames": 9},
}
UNGUIDED = {"z-image": {"guidance_scale": 0.0}} | {
    name: {"guidance_scale": 1.0} for name in ("wan", "stable-diffusion-3", "ltx", "flux-2")
}
GUIDED = {
    "qwen-image": {"true_cfg_scale": 4.0},
    "flux": {"true_cfg_scale": 4.0},
    "hunyuan-video": {"true_cfg_scale": 4.0},
}


@pytest.mark.parametrize("family", SHOWN)
def test_what_is_asked_shows(demo_models: dict[str, Path], family: str) -> None:
    folder = demo_models[family]
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str, **options: Any) -> Any:
        size = SIZE | FAMILY_SIZE.get(family, {})
        drawn = pipeline(prompt=prompt, generator=torch.Generator().manual_seed(1), **size, **options)
        pixels = 255 * np.asarray(drawn[0])
        assert np.isfinite(pixels).all()
        assert pixels.std() > 20 and ((pixels < 1) | (pixels > 254)).mean() < 0.1  # neither flat nor saturated
        return pixels

    plain = draw("a cup of coffee", **UNGUIDED.get(family, {}))
    other = draw("a red fox in the snow", **UNGUIDED.get(family, {}))
    takes = inspect.signature(pipeline.__call__).parameters
    avoid = {"negative_prompt": "blurry"} if "negative_prompt" in takes else {}
    guided = draw("a cup of coffee", **avoid, **GUIDED.get(family, {"guidance_scale": 4.0}))
    assert np.abs(plain - other).mean() > 10
    assert np.abs(plain - guided).mean() > 3


@pytest.mark.parametrize("family", tried())
def test_the_same_call_writes_the_same_files(demo_models: dict[str, Path], family: str, tmp_path: Path) -> None:
    folder = demo_models[family]
    again = tmp_path / family
    write_demo_model(again, family)
    written = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert written == {file.relative_to(again): file.read_bytes() for file in again.rglob("*") if file.is_file()}
