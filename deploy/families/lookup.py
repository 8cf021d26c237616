"""Finds the family of a model folder, and facts about a class. Files in this folder are found without a list.

Called by `deploy.check`, `deploy.memory`, `service.rollout.preflight` and the workers.
"""

import functools
import importlib
import pkgutil
from pathlib import Path

from deploy import families as room
from deploy.families.classic import (
    IMAGE_ENCODER_IN_FP32,
    TEXT_ENCODER_IN_FP32,
    UNSHIFTED_VAE_IN_FP32,
    check_config,
    check_controlnet,
    check_proved,
    classic_family,
    proved_pipelines,
)
from deploy.families.family import DecodeBytes, ForwardBytes, PipelineFamily
from deploy.families.schedulers import check_scheduler
from deploy.model_folder import read_config, read_index
from deploy.model_spec import ModelSpec

CLASSIC = "classic"
"""The name that all pipelines without a file of their own share."""


@functools.cache
def families() -> dict[str, PipelineFamily]:
    """The families that have a file, by its name."""
    names = [found.name for found in pkgutil.iter_modules(room.__path__)]
    modules = {name: importlib.import_module(f"{room.__name__}.{name}") for name in names}
    return {name: module.FAMILY for name, module in modules.items() if hasattr(module, "FAMILY")}


def family_name(folder: Path) -> str:
    """The name of the family that a model folder belongs to; `CLASSIC` if its pipeline has no file.

    Raises:
        ValueError: the folder is not a model, or one that spray cannot run.
    """
    pipeline = find_family(folder).pipeline
    return next((name for name, family in families().items() if family.pipeline == pipeline), CLASSIC)


def find_family(folder: Path) -> PipelineFamily:
    """The family that a model folder belongs to.

    Raises:
        ValueError: the folder is not a model, or one that spray cannot run.
    """
    index = read_index(folder)
    pipeline = str(index.get("_class_name"))
    try:
        family = family_of(pipeline)
        if pipeline not in (each.pipeline for each in families().values()):
            check_proved(pipeline, index.get("transformer"))
    except ValueError as error:
        known = ", ".join((*(each.pipeline for each in families().values()), *proved_pipelines()))
        raise ValueError(
            f"{folder} is for {pipeline}, which spray cannot run step by step: {error}; it can run: {known}"
        ) from None
    for key, reason in family.refused.items():
        if index.get(key):
            raise ValueError(f"{folder} {reason}")
    check_scheduler(folder, index, family.schedulers)
    check_controlnet(folder, index)
    check_config(folder, index)
    return family


@functools.cache
def family_of(pipeline: str) -> PipelineFamily:
    """The family of a pipeline by its class name.

    Raises:
        ValueError: says why spray cannot run it.
    """
    named = next((family for family in families().values() if family.pipeline == pipeline), None)
    return named or classic_family(pipeline)


def component_dtype(model: ModelSpec, folder: Path, component: str) -> str:
    """The name of the torch dtype in which a component of a model folder is loaded.

    Raises:
        ValueError: see `find_family`.
    """
    if component == "image_encoder" and find_family(folder).pipeline in IMAGE_ENCODER_IN_FP32:
        return "float32"
    if not component.startswith("vae"):
        return model.torch_dtype
    return model.vae_dtype or ("float32" if _vae_in_fp32(folder) else model.torch_dtype)


def _vae_in_fp32(folder: Path) -> bool:
    family = find_family(folder)
    if family.pipeline in UNSHIFTED_VAE_IN_FP32:
        return not read_config(folder / "vae" / "config.json").get("shift_factor")
    return family.vae_in_fp32


def parts_in_fp32(folder: Path, component: str) -> frozenset[str]:
    """The parts of a component, not a transformer, that run in fp32 in half precision, as path components of names.

    Raises:
        ValueError: see `find_family`.
    """
    if component != "text_encoder":
        return frozenset()
    return TEXT_ENCODER_IN_FP32.get(find_family(folder).pipeline, frozenset())


def forward_bytes(transformer: str) -> ForwardBytes | None:
    """Activations of a transformer class; None if it was not measured."""
    return next((f.forward_bytes[transformer] for f in families().values() if transformer in f.forward_bytes), None)


def decode_bytes(vae: str) -> DecodeBytes | None:
    """Activations of a VAE class; None if it was not measured."""
    return next((f.decode_bytes[vae] for f in families().values() if vae in f.decode_bytes), None)


def kept_in_fp32(transformer: str) -> frozenset[str]:
    """The parts of a transformer class that stay in fp32 in half precision, as path components of tensor names."""
    named = (family.kept_in_fp32.get(transformer, frozenset()) for family in families().values())
    return frozenset[str]().union(*named)
