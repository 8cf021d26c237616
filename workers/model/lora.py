"""Reads LoRA files: safetensors in any key format that diffusers converts come in, weights for `sp_core.lora` go out.

    for component, weights in read_lora(Path("ink.safetensors"), diffusers.QwenImagePipeline).items():
        adapters[component].load("ink", weights)

The conversion is diffusers' own, and alpha, rank patterns and metadata have the meaning of its `load_lora_weights`;
PEFT is not needed. Weights that diffusers would skip with a warning are refused here, so that an adapter is applied as
a whole or not at all. Called by `workers.model.loader` on every rank, and `service.rollout.preflight`.
"""

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import nn

from deploy.families.lookup import find_family
from deploy.model_folder import component_classes
from deploy.model_sections import LoRA
from deploy.model_spec import ModelSpec
from sp_core.lora import Adapters, AdapterShare, LowRank
from workers.model.diffusers_internals import lora_components
from workers.model.lora_strength import scaling_of_alphas, scaling_of_config, stated_config
from workers.model.out_of_tree import transformer_class
from workers.model.weights import build

WEIGHT = re.compile(r"lora.*\.weight$|alpha$")
"""Names of tensors that can be applied: the two matrices of a layer, and its alpha."""

OUTER = re.compile(r"(\.lora_B(\.default)?|(\.lora)?[._]up)\.weight$")
"""The suffix of a layer's matrix whose rows are output features."""

KINDS = {
    r"dora_scale|lora_magnitude": "DoRA weights",
    r"\.(lokr|hada|oft)_|lora_mid": "LyCORIS weights",
    r"(diff|diff_b|bias|norm\.scale)$": "weights that replace the model's, or biases",
    r"text_encoder|^lora_te|^conditioner": "weights for text encoders",
}
"""Other weights in such files, by their names."""


def read_lora(path: Path, pipeline: type[Any], component: str = "transformer") -> dict[str, dict[str, LowRank]]:
    """Read a whole adapter, onto the CPU.

    Args:
        path: a safetensors file.
        pipeline: the diffusers pipeline, classic or modular, that the adapter is for: it knows the key formats.
        component: where weights for "transformer" go; Wan 2.2 has files for "transformer_2".

    Returns:
        For each transformer that the file has weights for, what `Adapters.load` takes.

    Raises:
        ValueError: the file is of another kind, holds or says something that cannot be applied, or lacks half of a
            pair. The message names the file.
        OSError: there is no such file.
    """
    try:
        return _read_lora(path, pipeline, component)
    except OSError:
        raise
    except Exception as error:  # diffusers' converters raise anything
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read for {pipeline.__name__}: {said}") from error


def check_lora(lora: LoRA, model: ModelSpec, folder: Path) -> None:
    """Reject an adapter of a deployment that cannot be read for a model, or does not fit its layers.

    Args:
        lora: the adapter.
        model: the model, with its transformer's class.
        folder: its files; no weights are read.

    Raises:
        ValueError: see `read_lora` and `fit`.
        OSError: there is no such file.
    """
    found = read_lora(Path(lora.source), getattr(diffusers, find_family(folder).pipeline), lora.component)
    there = [name for name in component_classes(folder) if name in found]
    fit(lora, found, {name: Adapters(_with_shapes(build(folder / name, transformer_class(model)))) for name in there})


def _with_shapes(transformer: nn.Module) -> nn.Module:
    """Give the linear layers of a transformer without weights one element each, seen in the layer's shape."""
    for layer in transformer.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(torch.zeros(()).expand(layer.weight.shape), requires_grad=False)
    return transformer


def fit(
    lora: LoRA, found: Mapping[str, Mapping[str, LowRank]], adapters: Mapping[str, Adapters]
) -> dict[str, AdapterShare]:
    """A rank's share of an adapter, by transformer.

    Args:
        lora: the adapter.
        found: the result of `read_lora`.
        adapters: the adapters of each transformer.

    Raises:
        ValueError: the model lacks a transformer or a layer, or a layer has another shape. The message names the file.
    """
    absent = sorted(set(found) - set(adapters))
    if absent:
        raise ValueError(f"{lora.source} is for {absent[0]}, which the model does not have; set component")
    try:
        return {component: adapters[component].share(lora.name, each) for component, each in found.items()}
    except ValueError as error:
        raise ValueError(f"{lora.source} does not fit the model: {error}") from error


def _read_lora(path: Path, pipeline: type[Any], component: str) -> dict[str, dict[str, LowRank]]:
    denoisers = [name for name in lora_components(pipeline) if name.startswith("transformer")]
    if not denoisers:
        raise ValueError(f"diffusers loads no LoRA files for {pipeline.__name__}")
    if component not in denoisers:
        raise ValueError(f"{pipeline.__name__} has no component {component!r}; it has: {', '.join(denoisers)}")
    rows = _check_file(path)
    tensors, alphas, metadata = _convert(path, pipeline)
    stated = stated_config(path, bool(alphas or metadata))
    if rows > (left := sum(len(tensor) for name, tensor in tensors.items() if OUTER.search(name))):
        raise ValueError(f"{path}: diffusers has no place in {pipeline.__name__} for {rows - left} of {rows} features")
    found: dict[str, dict[str, LowRank]] = {}
    for denoiser in denoisers:
        mine, of_mine, config = (_under(denoiser, values) for values in (tensors, alphas, metadata))
        if mine:
            place = component if denoiser == "transformer" else denoiser
            if place in found:
                raise ValueError(f"{path} has weights for transformer and {place}; they cannot both go there")
            found[place] = _low_ranks(path, mine, of_mine, config or stated)
    surplus = [name for name in (*tensors, *alphas) if not name.startswith(tuple(f"{d}." for d in denoisers))]
    if surplus or not found:
        raise ValueError(f"{path}: expected weights for {' or '.join(denoisers)}, got {surplus[:3] or 'none'}")
    return found


def _check_file(path: Path) -> int:
    """Reject, by name, tensors that diffusers would drop or we cannot apply.

    Returns:
        The number of output features that the file adapts, to compare with what survives the conversion.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); convert it") from None
    for name in shapes:
        what = next((what for kind, what in KINDS.items() if re.search(kind, name)), None)
        if what or not WEIGHT.search(name):
            raise ValueError(f"{path} holds {what or 'something other than LoRA'} ({name!r}), which cannot be applied")
    rows = {OUTER.sub("", name): shape[0] for name, shape in shapes.items() if OUTER.search(name)}
    return sum(number for layer, number in rows.items() if not _is_double(layer, rows))


def _is_double(layer: str, layers: Container[str]) -> bool:
    """Whether the same layer is there under other names: some trainers write Z-Image's layers both fused and apart."""
    stem, twin = re.sub(r"(qkv|out)$", "", layer), "to_q" if layer.endswith("qkv") else "to_out_0"
    return stem != layer and any(stem + each in layers for each in (twin, twin.replace("_", ".")))


def _convert(path: Path, pipeline: type[Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors by diffusers' names, alphas that are not multiplied into them already, and the adapter's config."""
    try:
        tensors, *rest = pipeline.lora_state_dict(
            str(path), use_safetensors=True, local_files_only=True, return_alphas=True, return_lora_metadata=True
        )
    except Exception as error:  # its converters raise anything, and some of it has no text
        said = str(error) or type(error).__name__
        raise ValueError(f"{path} has no key format that diffusers knows for {pipeline.__name__}: {said}") from error
    alphas, metadata = rest if len(rest) == 2 else (None, *rest)  # the flux pipeline alone returns alphas
    if alphas and metadata:
        raise ValueError(f"{path} has both alphas and a config in its header; only one of them can be right")
    return tensors, alphas or {}, metadata or {}


def _under(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(f"{prefix}."): v for name, v in values.items() if name.startswith(f"{prefix}.")}


def _low_ranks(
    path: Path, tensors: dict[str, torch.Tensor], alphas: dict[str, Any], config: dict[str, Any]
) -> dict[str, LowRank]:
    """Pair the tensors of one transformer, by module."""
    if "lora_A" not in next(iter(tensors)):
        tensors = convert_unet_state_dict_to_peft(tensors)
    sides = (".lora_A.weight", ".lora_B.weight")
    modules = dict.fromkeys(name.removesuffix(side) for name in tensors for side in sides if name.endswith(side))
    surplus = sorted(set(tensors) - {module + side for module in modules for side in sides})
    absent = sorted({module + side for module in modules for side in sides} - set(tensors))
    if surplus or absent:
        raise ValueError(f"{path} does not hold A and B of every layer: missing {absent[:3]}, surplus {surplus[:3]}")
    scaling = scaling_of_config(path, config) if config else scaling_of_alphas(path, alphas, set(modules))
    return {
        module: LowRank(a, tensors[module + sides[1]], scaling(module, len(a)))
        for module, a in ((module, tensors[module + sides[0]]) for module in modules)
    }
