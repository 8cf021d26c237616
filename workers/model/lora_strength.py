"""The strength of an adapter: the factor of each layer, by its file, the file's header or PEFT's config.

A safetensors file and what diffusers read from it come in; functions from (module, rank) to a factor go out. A
statement that is not understood is refused, because an adapter of another strength draws another picture. Called by
`workers.model.lora`.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from deploy.model_folder import read_config

REFUSED_CONFIG = ("use_dora", "lora_bias", "use_qalora", "modules_to_save", "target_parameters", "layer_replication")
CHANGES_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations whose adapters fit only a model whose own weights were changed too."""

PEFT_CONFIG = "adapter_config.json"
PEFT_FILE = "adapter_model.safetensors"

ALPHAS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha", "transformer.lora_alpha")
"""Keys of a header that state one alpha for all layers."""

CONFIG_IN_HEADER = "lora_adapter_metadata"
"""Key of a header under which diffusers writes, and reads, PEFT's config."""


def stated_config(path: Path, has_own: bool) -> dict[str, Any]:
    """The strength stated outside of the tensors and diffusers' metadata, as a config of PEFT; empty if there is none.

    Args:
        path: the safetensors file.
        has_own: its tensors or diffusers' metadata state the strength already.

    Raises:
        ValueError: it is not understood, or contradicts what the tensors say.
    """
    with safe_open(path, framework="pt") as file:
        header: dict[str, str] = file.metadata() or {}
        own = {float(file.get_tensor(name)) for name in file.keys() if name.endswith("alpha")}  # noqa: SIM118
    beside, alpha = _config_beside(path), _alpha_of_header(path, header, bool(own))
    if own and alpha is not None and own != {alpha}:
        raise ValueError(f"{path} has alphas that differ from the {alpha:g} in its header; only one can be right")
    stated = [what for what, there in (("tensors", own or has_own), (PEFT_CONFIG, beside)) if there]
    if len(stated) > 1 or (beside and alpha not in (None, beside.get("lora_alpha"))):
        raise ValueError(f"{path} and the {PEFT_CONFIG} beside it both state its strength; remove one of them")
    if own or has_own or (beside is None and alpha is None):
        return {}
    return beside or {"lora_alpha": alpha, "r": None}


def _alpha_of_header(path: Path, header: Mapping[str, str], has_own: bool) -> float | None:
    """The alpha that a header states. What a trainer notes of its run (`ss_`) yields to the alphas of the tensors."""
    found: dict[str, float] = {}
    for key, text in header.items():
        if key == CONFIG_IN_HEADER or (has_own and key.startswith("ss_")) or text in ("None", ""):
            continue
        if key in ALPHAS:
            found[key] = _positive(path, key, text)
        elif re.search(r"alpha|rslora|scaling", key) or re.search(r'"lora_alpha"', text):
            raise ValueError(f"{path} states {key} {text[:60]!r} in its header, which is not understood")
    if len(set(found.values())) > 1:
        raise ValueError(f"{path} states several alphas in its header: {found}; only one can be right")
    return next(iter(found.values()), None)


def _positive(path: Path, key: str, text: str) -> float:
    try:
        value = float(json.loads(text))
    except (ValueError, TypeError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{path} states {key} {text[:60]!r} in its header; expected a number above 0")
    return value


def _config_beside(path: Path) -> dict[str, Any] | None:
    """PEFT's config for the file: of the file that PEFT itself writes, or of the only one in the folder."""
    file, of_peft = path.parent / PEFT_CONFIG, path.parent / PEFT_FILE
    if not file.exists() or (of_peft.exists() and path.name != PEFT_FILE):
        return None
    others = [each.name for each in path.parent.glob("*.safetensors") if each.name not in (path.name, PEFT_FILE)]
    if path.name != PEFT_FILE and any(name[0] != "." for name in others):
        raise ValueError(f"{file} may belong to {path.name} or to {others[0]}; give each adapter a folder of its own")
    return read_config(file)


def scaling_of_alphas(path: Path, alphas: dict[str, Any], modules: set[str]) -> Any:
    """Scale by alpha / rank, or by 1 if the file has no alphas."""
    by_module = {name.removesuffix(".alpha").removesuffix(".lora_A"): float(alpha) for name, alpha in alphas.items()}
    if by_module and set(by_module) != modules:
        wrong = sorted(set(by_module) ^ modules)
        raise ValueError(f"{path} must have an alpha for every layer or for none; mismatched: {wrong[:3]}")
    return lambda module, rank: by_module[module] / rank if by_module else 1.0


def scaling_of_config(path: Path, config: dict[str, Any]) -> Any:
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
        if expected not in (None, rank):  # a header that states only an alpha has no rank
            raise ValueError(f"{path} has rank {rank} for {module!r}, but its config says {expected}")
        alpha = float(by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scaling
