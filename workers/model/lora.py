"""Reads LoRA files: safetensors in any key format that diffusers converts come in, weights for `sp_core.lora` go out.

    for component, weights in read_lora(Path("ink.safetensors"), diffusers.QwenImagePipeline).items():
        adapters[component].load("ink", weights)

The conversion is diffusers' own, and alpha, rank patterns and metadata mean what they mean to its
`load_lora_weights`; PEFT is not needed. What diffusers would skip with a warning is refused here, so that an adapter is
applied as a whole or not at all. Called by `workers.model.loader` on every rank, and `service.rollout.preflight`.
"""

import math
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open

from deploy.families.lookup import find_family
from deploy.spec import LoRA
from sp_core.lora import LowRank
from workers.model.diffusers_internals import lora_components

WEIGHT = re.compile(r"lora.*\.weight$|alpha$")
"""Names of tensors that can be applied: the two matrices of a layer, and its alpha."""

OUTER = re.compile(r"(\.lora_B(\.default)?|(\.lora)?[._]up)\.weight$")
"""What follows a layer's name in the name of its matrix whose rows are output features."""

KINDS = {
    r"dora_scale|lora_magnitude": "DoRA weights",
    r"\.(lokr|hada|oft)_|lora_mid": "LyCORIS weights",
    r"(diff|diff_b|bias|norm\.scale)$": "weights that replace the model's, or biases",
    r"text_encoder|^lora_te|^conditioner": "weights for text encoders",
}
"""What else such files hold, by name."""

REFUSED_CONFIG = ("use_dora", "lora_bias", "use_qalora", "modules_to_save", "target_parameters", "layer_replication")
CHANGES_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations whose adapters fit only a model whose own weights were changed too."""


def read_lora(path: Path, pipeline: type[Any], component: str = "transformer") -> dict[str, dict[str, LowRank]]:
    """Read a whole adapter, onto the CPU.

    Args:
        path: a safetensors file.
        pipeline: the diffusers pipeline, classic or modular, that the adapter is for: it knows the key formats.
        component: where weights for "transformer" go; Wan 2.2 has files for "transformer_2".

    Returns:
        For each transformer that the file has weights for, what `Adapters.load` takes.

    Raises:
        ValueError: the file is of another kind, holds something that cannot be applied, or lacks half of a pair.
        OSError: there is no such file.
    """
    denoisers = [name for name in lora_components(pipeline) if name.startswith("transformer")]
    if not denoisers:
        raise ValueError(f"diffusers loads no LoRA files for {pipeline.__name__}")
    if component not in denoisers:
        raise ValueError(f"{pipeline.__name__} has no component {component!r}; it has: {', '.join(denoisers)}")
    rows = _check_file(path)
    tensors, alphas, metadata = _convert(path, pipeline)
    if rows > (left := sum(len(tensor) for name, tensor in tensors.items() if OUTER.search(name))):
        raise ValueError(f"{path}: diffusers has no place in {pipeline.__name__} for {rows - left} of {rows} features")
    found: dict[str, dict[str, LowRank]] = {}
    for denoiser in denoisers:
        mine, of_mine, config = (_under(denoiser, values) for values in (tensors, alphas, metadata))
        if mine:
            place = component if denoiser == "transformer" else denoiser
            if place in found:
                raise ValueError(f"{path} has weights for transformer and {place}; they cannot both go there")
            found[place] = _low_ranks(path, mine, of_mine, config)
    surplus = [name for name in (*tensors, *alphas) if not name.startswith(tuple(f"{d}." for d in denoisers))]
    if surplus or not found:
        raise ValueError(f"{path}: expected weights for {' or '.join(denoisers)}, got {surplus[:3] or 'none'}")
    return found


def check_lora(lora: LoRA, folder: Path) -> None:
    """Raise if an adapter of a deployment cannot be read for the model in a folder. Its layers are not compared.

    Raises:
        ValueError: see `read_lora`.
        OSError: there is no such file.
    """
    read_lora(Path(lora.source), getattr(diffusers, find_family(folder).pipeline), lora.component)


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
    except (ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:  # its converters raise any
        raise ValueError(f"{path} has no key format that diffusers knows for {pipeline.__name__}: {error}") from error
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
    scaling = _scaling_of_config(path, config) if config else _scaling_of_alphas(path, alphas, set(modules))
    return {
        module: LowRank(a, tensors[module + sides[1]], scaling(module, len(a)))
        for module, a in ((module, tensors[module + sides[0]]) for module in modules)
    }


def _scaling_of_alphas(path: Path, alphas: dict[str, Any], modules: set[str]) -> Any:
    """Scale by alpha / rank, or by 1 if the file has no alphas."""
    by_module = {name.removesuffix(".alpha").removesuffix(".lora_A"): float(alpha) for name, alpha in alphas.items()}
    if by_module and set(by_module) != modules:
        wrong = sorted(set(by_module) ^ modules)
        raise ValueError(f"{path} must have an alpha for every layer or for none; mismatched: {wrong[:3]}")
    return lambda module, rank: by_module[module] / rank if by_module else 1.0


def _scaling_of_config(path: Path, config: dict[str, Any]) -> Any:
    """Scale as PEFT's config says: alpha / rank or alpha / sqrt(rank), both by patterns that end a module's name."""
    refused = [key for key in REFUSED_CONFIG if config.get(key)]
    start = str(config.get("init_lora_weights", "")).lower()
    if refused or start.startswith(CHANGES_MODEL):
        what = refused[0] if refused else f"init_lora_weights={start}"
        raise ValueError(f"{path} was trained with {what}, which cannot be applied")

    def by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
        matching = (key for key in patterns or {} if re.match(rf"(.*\.)?({key})$", module))
        key = next(matching, None)
        return default if key is None else (patterns or {})[key]

    def scaling(module: str, rank: int) -> float:
        expected = by_pattern(config.get("rank_pattern"), module, config.get("r", 8))  # PEFT's defaults
        if expected != rank:
            raise ValueError(f"{path} has rank {rank} for {module!r}, but its config says {expected}")
        alpha = float(by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scaling
