"""Memory that one forward of a transformer and one decode of a VAE take besides the weights: the constants of
`deploy.activations`.

    python -m tests.benchmarks.activation_memory [--only CLASS]

Real widths, one layer of each kind (the activations of layers do not add up at inference), bfloat16, on the CPU.
Weights are zeros: the sizes of tensors do not depend on values. Counted are the storages that torch's operators return
and that are alive at once; what an operator uses inside is not. Each constant is the slope between two sizes.
"""

import argparse
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.tile_parallel import TileParallelVAE
from sp_core.verify.rank_pool import RankPool

DTYPE = torch.bfloat16
TEXT = 64
"""Tokens of text; the slope is over tokens of the picture."""

SIDES = ((32, 48), (48, 64))
"""Heights and widths in tokens between which the slope is taken; large, so that the text is not what counts."""

LAYOUTS = {
    "1 rank": ParallelDegrees(),
    "tp 2": ParallelDegrees(tensor_parallel_size=2),
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
    "ring 2": ParallelDegrees(ring_degree=2),
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operators return, while it lives.

    Attributes:
        peak: the most at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        returned = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                given.add(storage._cdata)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return returned

    def _add(self, size: int) -> None:
        self._now += size
        self.peak = max(self.peak, self._now)


def qwen(height: int, width: int) -> dict[str, Any]:
    """Arguments of a forward; sizes in tokens."""
    return {
        "hidden_states": torch.zeros(1, height * width, 64, dtype=DTYPE),
        "encoder_hidden_states": torch.zeros(1, TEXT, 3584, dtype=DTYPE),
        "timestep": torch.full((1,), 0.5, dtype=DTYPE),
        "img_shapes": [[(1, height, width)]],
    }


def flux(height: int, width: int) -> dict[str, Any]:
    """Arguments of a forward; sizes in tokens."""
    return {
        "hidden_states": torch.zeros(1, height * width, 64, dtype=DTYPE),
        "encoder_hidden_states": torch.zeros(1, TEXT, 4096, dtype=DTYPE),
        "pooled_projections": torch.zeros(1, 768, dtype=DTYPE),
        "timestep": torch.full((1,), 0.5, dtype=DTYPE),
        "guidance": torch.full((1,), 4.0),
        "img_ids": torch.zeros(height * width, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def wan(height: int, width: int) -> dict[str, Any]:
    """Arguments of a forward; sizes in tokens."""
    return {
        "hidden_states": torch.zeros(1, 16, 1, 2 * height, 2 * width, dtype=DTYPE),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.zeros(1, 512, 4096, dtype=DTYPE),
    }


def z_image(height: int, width: int) -> dict[str, Any]:
    """Arguments of a forward; sizes in tokens."""
    return {
        "x": [torch.zeros(16, 1, 2 * height, 2 * width, dtype=DTYPE)],
        "t": torch.full((1,), 0.5),
        "cap_feats": [torch.zeros(TEXT, 2560, dtype=DTYPE)],
    }


@dataclass(frozen=True)
class Case:
    """A transformer: the config of the real model but for the number of layers, and what makes its arguments."""

    config: dict[str, Any]
    arguments: Callable[[int, int], dict[str, Any]]


HEADS = {"num_attention_heads": 24, "attention_head_dim": 128}
TRANSFORMERS = {
    "QwenImageTransformer2DModel": Case(
        {"in_channels": 64, "out_channels": 16, "num_layers": 1, "joint_attention_dim": 3584, **HEADS}, qwen
    ),
    "FluxTransformer2DModel": Case({"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True, **HEADS}, flux),
    "WanTransformer3DModel": Case({"num_layers": 1}, wan),  # diffusers' defaults are the 14B model's
    "ZImageTransformer2DModel": Case({"n_layers": 1, "n_refiner_layers": 1}, z_image),
}

VAES: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 16,
        "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024,
    },
    "AutoencoderKLQwenImage": {},
    "AutoencoderKLWan": {},
}  # fmt: skip


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description="Activations of a forward and of a decode, in bytes.")
    parser.add_argument("--only", choices=[*TRANSFORMERS, *VAES], help="one class")
    only = parser.parse_args().only
    print("| transformer, bytes per token of the sequence | " + " | ".join(LAYOUTS) + " |")
    print("|---" * (len(LAYOUTS) + 1) + "|")
    for name in TRANSFORMERS:
        if only in (None, name):
            print(f"| {name} | {' | '.join(f'{_per_token(name, d):.0f}' for d in LAYOUTS.values())} |", flush=True)
    print("\n| VAE, bytes per pixel of the output | 1 frame | 5 frames | 9 frames | tiled, 1 frame | tiled, 5 frames |")
    print("|---|---|---|---|---|---|")
    for name in VAES:
        if only in (None, name):
            print(f"| {name} | {' | '.join(_per_pixel(name))} |", flush=True)


def _per_token(name: str, degrees: ParallelDegrees) -> float:
    """Bytes on the rank with most, by each token of the whole sequence."""
    pool = RankPool(degrees.world_size)
    small, large = (max(pool.run(degrees, forward, name, sides)) for sides in SIDES)
    pool.stop()
    (h0, w0), (h1, w1) = SIDES
    return (large - small) / (h1 * w1 - h0 * w0)


def forward(mesh: ParallelMesh, name: str, sides: tuple[int, int]) -> int:
    """On one rank: the peak of a forward, in bytes."""
    case = TRANSFORMERS[name]
    with init_empty_weights(include_buffers=False):
        model = getattr(diffusers, name)(**case.config).eval()
    parallelize(model, mesh)
    _with_zeros(model)
    arguments = case.arguments(*sides)
    return _peak(lambda: model(**arguments, return_dict=False))


def _per_pixel(name: str) -> list[str]:
    """For each number of frames, whole and in tiles; a dash where there is no such output."""
    with init_empty_weights(include_buffers=False):
        vae = getattr(diffusers, name)(**VAES[name]).eval()
    _with_zeros(vae)
    kinds = [(1, False), (5, False), (9, False), (1, True), (5, True)]
    makes_video = name == "AutoencoderKLWan"
    return [f"{_decode(vae, *kind):.0f}" if kind[0] == 1 or makes_video else "-" for kind in kinds]


def _decode(vae: Any, frames: int, tiled: bool) -> float:
    """Bytes by each pixel of the output; in tiles those that come on top of what one tile takes."""
    if tiled and hasattr(vae, "tile_sample_min_size"):
        vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    elif tiled:
        vae.tile_sample_min_height = vae.tile_sample_min_width = 64
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = 48
    decoder = TileParallelVAE(vae, None) if tiled else vae
    time = () if type(vae).__name__ == "AutoencoderKL" else ((frames - 1) // 4 + 1,)
    sides = (192, 384) if tiled else (96, 192)
    peaks = []
    for side in sides:
        latents = torch.zeros(1, 16, *time, side // 8, side // 8, dtype=DTYPE)
        peaks.append(_peak(lambda latents=latents: decoder.decode(latents, return_dict=False)))  # type: ignore[misc]
    return (peaks[1] - peaks[0]) / (sides[1] ** 2 - sides[0] ** 2)


def _with_zeros(model: nn.Module) -> None:
    """Give a model that was built without weights zeros of the dtype in which it is served."""
    kept_wide: list[str] = getattr(model, "_keep_in_fp32_modules", None) or []
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        dtype = torch.float32 if any(part in name for part in kept_wide) else DTYPE
        zeros = torch.zeros(parameter.shape, dtype=dtype)
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)


def _peak(run: Callable[[], object]) -> int:
    with torch.no_grad(), LiveBytes() as live:
        run()
    return live.peak


if __name__ == "__main__":
    main()
