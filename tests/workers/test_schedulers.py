"""Schedulers that a model folder may name: each draws what diffusers' classic pipeline draws, from one step on."""

import functools
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from deploy.check import check_deployment
from deploy.families.lookup import families, family_name
from deploy.spec import DeploymentSpec, SpecError
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.deployments import model
from tests.workers.test_adapters import LAYOUTS, PICTURES, REQUESTS, alone, differ
from tests.workers.test_denoising import ALONE, PRODUCTS, begun, check, generate
from workers.errors import RequestFailed
from workers.gang.local import generate_locally
from workers.messages import GenerationRequest
from workers.model.adapters.lookup import find_adapter
from workers.model.loader import load_model

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


def index_with(folder: Path, scheduler: str) -> str:
    index = json.loads((folder / "model_index.json").read_text())
    return json.dumps(index | {"scheduler": ["diffusers", scheduler]})


def with_scheduler(folder: Path, place: Path, kind: str, config: dict[str, Any]) -> Path:
    """A copy of a model with another scheduler."""
    copy = place / folder.name
    shutil.copytree(folder, copy)
    (copy / "model_index.json").write_text(index_with(copy, kind))
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


FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

NOISE: dict[str, tuple[str, dict[str, Any]]] = {
    "stochastic euler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "lcm": ("FlowMatchLCMScheduler", {}),
    "sde": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_dynamic_shifting": True, **FLOW},
    ),
}  # fmt: skip
"""The schedulers that draw noise in each step."""

ACCEPTED = [
    (family, name, needs)
    for family in GUIDED
    for name, needs in families()[family.replace("-", "_")].schedulers.items()
]


@pytest.mark.parametrize(
    ("family", "kind", "needs"), ACCEPTED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_scheduler_draws_what_the_classic_pipeline_draws(
    demo_models: dict[str, Path], tmp_path: Path, family: str, kind: str, needs: dict[str, Any]
) -> None:
    """Guided: a scheduler of second order has more steps than were asked for, and all of them are guided."""
    request, told = GUIDED[family]
    solves_flow = "use_flow_sigmas" in inspect.signature(getattr(diffusers, kind)).parameters
    folder = with_scheduler(demo_models[family], tmp_path, kind, {**(FLOW if solves_flow else {}), **needs})
    _, made = alone(folder, request)
    assert differ(made, classic(folder, request, told)) <= 1


NOISY = [(family, noise) for family in GUIDED for noise in NOISE]
NOISY = [case for case in NOISY if case not in (("qwen-image", "sde"), ("z-image", "sde"))]  # no scheduler of theirs


@pytest.mark.parametrize(("family", "noise"), NOISY)
def test_noise_comes_from_the_seed(demo_models: dict[str, Path], tmp_path: Path, family: str, noise: str) -> None:
    """So a retry draws the same, and number 2 of two pictures is the picture of the next seed."""
    request, told = GUIDED[family]
    kind, config = NOISE[noise]
    folder = with_scheduler(demo_models[family], tmp_path, kind, config)
    latents, made = alone(folder, replace(request, n=2))
    assert differ(made, classic(folder, replace(request, n=2), told)) <= 1
    torch.manual_seed(1)  # of the generator that the classic pipeline would use
    again, _ = alone(folder, replace(request, n=2))
    assert torch.equal(again, latents)
    _, second = alone(folder, replace(request, seed=request.seed + 1))
    assert differ(made[1:], second) <= 1


@pytest.mark.parametrize(
    ("noise", "layout"),
    [("stochastic euler", "cfg 2 x ulysses 2"), ("stochastic euler", "ring 3"), ("lcm", "cfg 2")],
)
def test_noise_is_the_same_on_every_layout(
    ranks: RankPool, demo_model: Path, tmp_path: Path, noise: str, layout: str
) -> None:
    """Unguided, so that the groups of cfg share the three pictures."""
    kind, config = NOISE[noise]
    folder = with_scheduler(demo_model, tmp_path, kind, config)
    request = replace(GUIDED["qwen-image"][0], negative_prompt=None, n=3)
    ((latents, made),) = ranks.run(ALONE, generate, folder, request)
    ((quiet, _),) = ranks.run(ALONE, generate, demo_model, request)
    assert error(latents, quiet) > 100 * BAR
    check(ranks.run((PRODUCTS | LAYOUTS)[layout], generate, folder, request), latents, made)


def test_sde_noise_is_the_same_on_every_layout(ranks: RankPool, demo_models: dict[str, Path], tmp_path: Path) -> None:
    kind, config = NOISE["sde"]
    folder = with_scheduler(demo_models["wan"], tmp_path, kind, config)
    request, _ = GUIDED["wan"]
    ((latents, made),) = ranks.run(ALONE, generate, folder, request)
    for layout in ("cfg 2", "ring 3"):
        check(ranks.run((PRODUCTS | LAYOUTS)[layout], generate, folder, request), latents, made)


def test_steps_are_those_of_the_scheduler(demo_models: dict[str, Path], tmp_path: Path) -> None:
    folder = with_scheduler(demo_models["wan"], tmp_path, "FlowMatchHeunDiscreteScheduler", {})
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    denoising = begun(load_model(model(folder), mesh), GUIDED["wan"][0])
    assert denoising.total_steps == 2 * 3 - 1
    for _ in range(5):
        assert not denoising.done
        denoising.step()
    assert denoising.done


ALL = sorted(
    name
    for name in dir(diffusers.schedulers)
    if isinstance(kind := getattr(diffusers.schedulers, name), type) and issubclass(kind, diffusers.SchedulerMixin)
)


@pytest.mark.parametrize("family", GUIDED)
def test_all_other_schedulers_are_refused_by_name(demo_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Those that draw noise which no seed settles among them."""
    accepted = families()[family.replace("-", "_")].schedulers
    assert set(accepted) < set(ALL)
    folder = with_scheduler(demo_models[family], tmp_path, "none", {})
    for name in set(ALL) - set(accepted):
        (folder / "model_index.json").write_text(index_with(folder, name))
        with pytest.raises(ValueError, match=f"has the scheduler {name}, with which spray cannot run"):
            family_name(folder)


REFUSED = {
    "sde of another class": (
        "wan", "DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "not settled by a request's seed",
    ),
    "another sde": (
        "wan", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver"}, "not settled by a request's seed",
    ),
    "a shift that nobody tells": (
        "wan", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True},
        "only if use_dynamic_shifting is False, got True",
    ),
    "sigmas that it does not take": (
        "qwen-image", "UniPCMultistepScheduler", {"solver_order": 2}, "only if use_flow_sigmas is True, got None",
    ),
    "latents that grow": (
        "flux", "FlowMatchLCMScheduler", {"scale_factors": [0.5]}, r"only if scale_factors is None, got \[0.5\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_pipeline_cannot_do_is_refused_by_check(demo_models: dict[str, Path], tmp_path: Path, name: str) -> None:
    family, kind, config, said = REFUSED[name]
    folder = with_scheduler(demo_models[family], tmp_path, kind, config)
    spec = DeploymentSpec(models=[model(folder)])
    with pytest.raises(SpecError, match=said):
        check_deployment(spec, {"cpu": 8.0, "cuda": 0.0})
