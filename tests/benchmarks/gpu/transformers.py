"""Full-size transformers with random weights, and the inputs of their steps; small ones to try the script with.

The configs are those of the published models, as far as they decide shapes. Values are random, so that pictures are
noise; what a step costs does not depend on them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils._pytree import tree_map

from sp_core.verify import examples
from workers.model.diffusers_internals import stays_fp32

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A transformer and one step of it.

    Attributes:
        name: of the model.
        size: what is drawn, in words.
        build: makes it on the CPU, or without memory.
        inputs: keyword arguments of a forward, from the seed of a text.
        branches: forwards of a step: two where it is guided.
        timestep_is_kept: it gets its timestep unrounded, as `workers.model.adapters` says of its pipeline.
    """

    name: str
    size: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    branches: int
    timestep_is_kept: bool = False

    def model(self, device: torch.device, dtype: torch.dtype, fake: bool) -> nn.Module:
        """The transformer on its device."""
        if fake:
            return self.build()
        with init_empty_weights(include_buffers=False):  # frequency tables and such are made for real
            model = self.build()
        fill(model, device, dtype)
        return model.eval()

    def steps_inputs(self, device: torch.device, dtype: torch.dtype) -> list[Inputs]:
        """The inputs of each branch."""

        def moved(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() and value.ndim > 1 else value.dtype)

        return [tree_map(moved, self.inputs(2 + i)) for i in range(self.branches)]


@torch.no_grad()
def fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model that was built without weights random ones that keep numbers finite."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        kept = torch.empty(
            parameter.shape, device=device, dtype=torch.float32 if stays_fp32(type(model), name) else dtype
        )
        if parameter.ndim > 1:
            kept.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            kept.fill_(1.0 if name.endswith("weight") else 0.0)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=False))
    for module in model.modules():
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, buffer.to(device))


def _z_image(text: int) -> Inputs:
    return {
        "x": [examples.randn(16, 1, 128, 128)],
        "t": torch.full((1,), 0.5),
        "cap_feats": [examples.randn(128, 2560, seed=text)],
    }


def _flux(text: int) -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    return {
        "hidden_states": examples.randn(1, 4096, 64),
        "encoder_hidden_states": examples.randn(1, 512, 4096, seed=text),
        "pooled_projections": examples.randn(1, 768, seed=text),
        "timestep": torch.full((1,), 0.5),
        "guidance": torch.full((1,), 3.5),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3),
        "txt_ids": torch.zeros(512, 3),
    }


def _qwen_image(text: int) -> Inputs:
    return {
        "hidden_states": examples.randn(1, 4096, 64),
        "encoder_hidden_states": examples.randn(1, 128, 3584, seed=text),
        "timestep": torch.full((1,), 0.5),
        "img_shapes": [[(1, 64, 64)]],
    }


def _wan(text: int) -> Inputs:
    return {
        "hidden_states": examples.randn(1, 16, 21, 60, 104),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": examples.randn(1, 512, 4096, seed=text),
    }


def cases(fake: bool) -> Sequence[Case]:
    """The transformers, the shortest step first. Wan 2.2 A14B has two of the same shape, one at work in each step."""
    if fake:
        return [_tiny("z-image", 1), _tiny("qwen-image", 2)]
    flux = {"guidance_embeds": True}
    return [
        _full("Z-Image", "1024x1024, text 128", "ZImageTransformer2DModel", {}, _z_image, 1, timestep_is_kept=True),
        _full("Flux.1", "1024x1024, text 512", "FluxTransformer2DModel", flux, _flux, 1),
        _full("Qwen-Image", "1024x1024, text 128, guided", "QwenImageTransformer2DModel", {}, _qwen_image, 2),
        _full("Wan 2.2 A14B", "832x480, 81 frames, guided", "WanTransformer3DModel", {}, _wan, 2),
    ]


def _full(
    name: str, size: str, kind: str, config: Inputs, inputs: Callable[[int], Inputs], branches: int, **options: bool
) -> Case:
    """diffusers' defaults are the published models' sizes."""
    return Case(name, size, functools.partial(getattr(diffusers, kind), **config), inputs, branches, **options)


def _tiny(name: str, branches: int) -> Case:
    tiny = examples.TINY[name]
    return Case(
        f"tiny {name}", "a few tokens", tiny.build, lambda text: tiny.inputs("even", "none", 1), branches,
        timestep_is_kept=name == "z-image",
    )  # fmt: skip
