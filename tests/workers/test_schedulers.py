"""Schedulers that a model folder may name: each draws what diffusers' classic pipeline draws, from one step on."""

import functools
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.support.deployments import model
from tests.workers.test_adapters import PICTURES, REQUESTS, alone, differ
from workers.errors import RequestFailed
from workers.gang.local import generate_locally
from workers.messages import GenerationRequest
from workers.model.adapters.lookup import find_adapter

SMALL = {"width": 64, "height": 48, "num_inference_steps": 3, "n": 1}
GUIDED: dict[str, tuple[GenerationRequest, dict[str, Any]]] = {
    "qwen-image": (
        replace(PICTURES, **SMALL, negative_prompt="blurry"),
        {"true_cfg_scale": PICTURES.guidance_scale, "negative_prompt": "blurry"},
    ),
    **{name: (replace(REQUESTS[name][1], **SMALL), REQUESTS[name][2]) for name in ("z-image", "wan", "flux")},
}
"""For each family our request, and what the classic pipeline is told."""

QWEN_SHIPPED = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""What distinguishes the scheduler of Qwen/Qwen-Image from the defaults of its class."""


def with_scheduler(folder: Path, place: Path, kind: str, config: dict[str, Any]) -> Path:
    """A copy of a model with another scheduler."""
    copy = place / folder.name
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", kind]
    (copy / "model_index.json").write_text(json.dumps(index))
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, **config}))
    return copy


def classic(folder: Path, request: GenerationRequest, told: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """What the classic pipeline draws; a scheduler that draws noise takes it from the generators of the request."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(request.seed + i) for i in range(request.n)]
    if "generator" in inspect.signature(pipeline.scheduler.step).parameters:
        pipeline.scheduler.step = functools.partial(pipeline.scheduler.step, generator=generators)
    made = pipeline(
        request.prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        generator=generators,
        output_type="np",
        **{find_adapter(folder).count_input: request.n},
        **told,
    )[0]
    return [(each * 255).round().astype(np.int16) for each in made]


@pytest.mark.parametrize("config", [QWEN_SHIPPED, {"shift_terminal": 0.02}, {}], ids=["shipped", "terminal", "plain"])
@pytest.mark.parametrize("family", GUIDED)
def test_one_step_draws(demo_models: dict[str, Path], tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    """Classic pipelines divide 0 by 0 to stretch one step to `shift_terminal`; without it, one step is theirs."""
    kind = "FlowMatchEulerDiscreteScheduler"
    if family == "wan":  # its classic pipeline does not shift by the size of the picture
        config = config | {"use_dynamic_shifting": False}
    folder = with_scheduler(demo_models[family], tmp_path, kind, config)
    request, told = GUIDED[family]
    latents, made = alone(folder, replace(request, num_inference_steps=1))
    assert latents.isfinite().all()
    unstretched = {key: value for key, value in config.items() if key != "shift_terminal"}
    reference = with_scheduler(demo_models[family], tmp_path / "unstretched", kind, unstretched)
    assert differ(made, classic(reference, replace(request, num_inference_steps=1), told)) <= 1


def test_two_steps_are_stretched(demo_models: dict[str, Path], tmp_path: Path) -> None:
    request, told = GUIDED["qwen-image"]
    request = replace(request, num_inference_steps=2)
    folder = with_scheduler(demo_models["qwen-image"], tmp_path, "FlowMatchEulerDiscreteScheduler", QWEN_SHIPPED)
    _, made = alone(folder, request)
    assert differ(made, classic(folder, request, told)) <= 1


@pytest.mark.processes
@pytest.mark.parametrize("degree", [1, 2])
def test_latents_that_are_not_finite_are_an_error(demo_model: Path, tmp_path: Path, degree: int) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(demo_model, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.bias"][0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    request = replace(PICTURES, **SMALL)
    with pytest.raises(RequestFailed, match="the latents are not finite after step 1 of 3"):
        generate_locally(model(folder, ulysses_degree=degree), request, lambda _: None)
