"""The schedulers of diffusers that a family runs with: those of its classic pipeline that can repeat an answer.

A scheduler that draws noise in its steps is served if the noise can come from the request's seed, so that every rank,
every layout and a retry draw the same. Called by `deploy.families.lookup`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.model_folder import read_config

Schedulers = dict[str, Mapping[str, Any]]
"""Schedulers by class name, each with the values of its config without which the pipeline fails."""

FLOW_MATCH: Schedulers = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {"scale_factors": None},  # latents that grow do not fit the pipelines
}

BY_STEPS: Schedulers = {"UniPCMultistepScheduler": {"use_dynamic_shifting": False}}
"""For pipelines that pass only the number of steps to their scheduler."""

NAMED = (
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "FlowMapEulerDiscreteScheduler",
    "SCMScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers that a pipeline runs with if its constructor names them."""

OF_NOISE = (
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers that a pipeline runs with if its constructor names KarrasDiffusionSchedulers, diffusers' name for the
schedulers of Stable Diffusion."""


def schedulers_of(classes: tuple[str, ...], gives_sigmas: bool) -> Schedulers:
    """The schedulers that a pipeline runs with.

    Args:
        classes: the scheduler classes that its constructor names.
        gives_sigmas: whether it passes the noise of each step to the scheduler.
    """
    flows = FLOW_MATCH if gives_sigmas else FLOW_MATCH | BY_STEPS
    if any(name in FLOW_MATCH for name in classes):
        return flows
    names = OF_NOISE if "KarrasDiffusionSchedulers" in classes else [name for name in NAMED if name in classes]
    return {name: {} for name in names} or flows


SEEDED = ("DPMSolverMultistepScheduler", "sde-dpmsolver++")
"""The one solver of stochastic equations whose noise is taken from the request's seed."""


def check_scheduler(folder: Path, index: Mapping[str, Any], schedulers: Schedulers) -> None:
    """Reject a model whose scheduler the pipeline does not run with.

    Args:
        folder: the model; a config that is not there yet is not checked.
        index: its `model_index.json`.
        schedulers: those of its family.

    Raises:
        ValueError: the message names the scheduler and what to change.
    """
    entry = index.get("scheduler")
    if not isinstance(entry, list) or len(entry) != 2 or not entry[1]:
        return
    name, pipeline = str(entry[1]), index.get("_class_name")
    if name not in schedulers:
        known = ", ".join(schedulers)
        raise ValueError(f"{folder} has the scheduler {name}, with which spray cannot run {pipeline}; it can: {known}")
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.exists():
        return
    config = read_config(file)
    solver = config.get("algorithm_type")
    if isinstance(solver, str) and solver.startswith("sde-") and (name, solver) != SEEDED:
        raise ValueError(
            f"{file}: {name} with algorithm_type {solver!r} draws noise that is not settled by a request's seed; take "
            f"{SEEDED[0]} with {SEEDED[1]!r}, or one without noise"
        )
    for key, needed in schedulers[name].items() if config else ():
        if (config.get(key) or None) != (needed or None):
            raise ValueError(f"{file}: {pipeline} runs with {name} only if {key} is {needed}, got {config.get(key)!r}")
