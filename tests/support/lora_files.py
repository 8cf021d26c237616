"""LoRA files for the tiny transformers of `sp_core.verify.examples`, and what diffusers and PEFT make of them."""

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import nn

from sp_core.verify import examples

PIPELINES = {
    "qwen-image": "QwenImagePipeline",
    "wan": "WanPipeline",
    "z-image": "ZImagePipeline",
    "flux": "FluxPipeline",
    "flux-2": "Flux2Pipeline",
    "ltx": "LTXPipeline",
    "hunyuan-video": "HunyuanVideoPipeline",
    "sd3": "StableDiffusion3Pipeline",
}
CELL = ("uneven", "none", 2)


def forward(model: nn.Module, name: str) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(**examples.inputs(name, *CELL), return_dict=False)[0])


def linears(name: str) -> dict[str, nn.Linear]:
    return {n: m for n, m in examples.TINY[name].model.named_modules() if isinstance(m, nn.Linear)}


def pair(linear: nn.Linear, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B such that the layer's output changes by about half of what it is."""
    out, into = linear.weight.shape
    b = examples.randn(out, rank, seed=seed + 1) / (4 * rank) ** 0.5
    return examples.randn(rank, into, seed=seed) / into**0.5, b


def write(path: Path, name: str, every: int = 1, config: dict[str, Any] | None = None) -> Path:
    """An adapter in diffusers' own format for each so many-th linear layer, with ranks from 1 to 5."""
    tensors: dict[str, torch.Tensor] = {}
    for i, (module, linear) in enumerate(linears(name).items()):
        if i % every == 0:
            rank = 4 if config else 1 + i % 5
            a, b = pair(linear, rank, seed=1000 * every + 2 * i)
            tensors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
    said = {f"transformer.{key}": value for key, value in (config or {}).items()}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(said)} if said else None)
    return path


def write_with_config(path: Path, name: str) -> Path:
    """As PEFT saves it: ranks and alphas by pattern, of which some end a name and some are it."""
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for i, (module, linear) in enumerate(linears(name).items()):
        ranks[f"^{module}"], alphas[module if i % 2 else f"^{module}"] = 1 + i % 5, 2.0 + i % 3
        a, b = pair(linear, 1 + i % 5, seed=2 * i)
        tensors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
    config: dict[str, Any] = {"r": 4, "lora_alpha": 3, "rank_pattern": ranks, "alpha_pattern": alphas}
    config["target_modules"] = list(linears(name))
    said = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file(tensors, path, {"lora_adapter_metadata": said})
    return path


def kind_of(name: str) -> Any:
    return getattr(diffusers, PIPELINES[name])


def pipeline_of(name: str, model: nn.Module) -> Any:
    """diffusers' pipeline around a transformer alone."""
    kind = kind_of(name)
    needed = inspect.signature(kind.__init__).parameters.values()
    absent = {p.name: None for p in needed if p.default is p.empty and p.name != "self"}
    return kind(**(absent | {"transformer": model}))


def by_peft(name: str, files: Mapping[str, Path], states: dict[str, dict[str, float]]) -> dict[str, list[torch.Tensor]]:
    """What diffusers and PEFT make of each state on one process."""
    model = copy.deepcopy(examples.TINY[name].model)
    found = {"off": forward(model, name)}
    pipeline = pipeline_of(name, model)
    for adapter, path in files.items():
        pipeline.load_lora_weights(str(path), adapter_name=adapter)
    for state, scales in states.items():
        if scales:
            pipeline.set_adapters(list(scales), list(scales.values()))
            found[state] = forward(model, name)
    return found
