"""The transformers of all families as wide as they are published, with one or two layers of each kind, and inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

BF16 = torch.bfloat16


@dataclass(frozen=True)
class FullWidth:
    """One family's transformer. What `init` leaves out is the class's own default, which is then the published width.

    Attributes:
        transformer_class: the diffusers class.
        inputs: makes the keyword arguments of one forward, on CUDA; their lengths divide by 8.
        init: its constructor's arguments.
        depth: those that count layers.
    """

    transformer_class: str
    inputs: Callable[[], dict[str, Any]]
    init: Mapping[str, Any] = field(default_factory=dict)
    depth: tuple[str, ...] = ("num_layers",)

    def config(self, layers: int) -> dict[str, Any]:
        """The config of a model with so many layers of each kind."""
        return {"_class_name": self.transformer_class, **self.init, **dict.fromkeys(self.depth, layers)}


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=BF16, device="cuda")


def _full(value: float, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype, device="cuda")


def _qwen_image(text: int = 24, batch: int = 1, masked: bool = False) -> dict[str, Any]:
    """1024 x 1024 pixels: 64 x 64 tokens."""
    return {
        "hidden_states": _empty(batch, 64 * 64, 64),
        "encoder_hidden_states": _empty(batch, text, 3584),
        "encoder_hidden_states_mask": _full(True, batch, text, dtype=torch.bool) if masked else None,
        "timestep": _full(0.5, batch),
        "img_shapes": [[(1, 64, 64)]] * batch,
    }


def _flux() -> dict[str, Any]:
    return {
        "hidden_states": _empty(1, 4096, 64),
        "encoder_hidden_states": _empty(1, 512, 4096),
        "pooled_projections": _empty(1, 768),
        "timestep": _full(0.5, 1),
        "guidance": _full(4.0, 1, dtype=torch.float32),
        "img_ids": _empty(4096, 3),
        "txt_ids": _empty(512, 3),
    }


def _flux_2() -> dict[str, Any]:
    return {
        "hidden_states": _empty(1, 4096, 128),
        "encoder_hidden_states": _empty(1, 512, 15360),
        "timestep": _full(0.5, 1),
        "guidance": _full(4.0, 1, dtype=torch.float32),
        "img_ids": _empty(1, 4096, 4),
        "txt_ids": _empty(1, 512, 4),
    }


def _z_image() -> dict[str, Any]:
    return {
        "x": [_empty(16, 1, 128, 128)],
        "t": _full(0.5, 1, dtype=torch.float32),
        "cap_feats": [_empty(64, 2560)],
    }


def _wan() -> dict[str, Any]:
    """81 frames of 1280 x 720 pixels: 21 x 45 x 80 tokens."""
    return {
        "hidden_states": _empty(1, 16, 21, 90, 160),
        "timestep": _full(500.0, 1, dtype=torch.float32),
        "encoder_hidden_states": _empty(1, 512, 4096),
    }


def _wan_vace() -> dict[str, Any]:
    return _wan() | {
        "control_hidden_states": _empty(1, 96, 21, 90, 160),
        "control_hidden_states_scale": _full(1.0, 1),
    }


def _ltx() -> dict[str, Any]:
    return {
        "hidden_states": _empty(1, 7 * 16 * 24, 128),
        "encoder_hidden_states": _empty(1, 128, 4096),
        "encoder_attention_mask": _full(1, 1, 128, dtype=torch.int64),
        "timestep": _full(500.0, 1, 1, dtype=torch.float32),
        "num_frames": 7,
        "height": 16,
        "width": 24,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _hunyuan_video() -> dict[str, Any]:
    """5 x 24 x 40 tokens of video."""
    return {
        "hidden_states": _empty(1, 16, 5, 48, 80),
        "timestep": _full(500, 1, dtype=torch.int64),
        "encoder_hidden_states": _empty(1, 256, 4096),
        "encoder_attention_mask": _full(True, 1, 256, dtype=torch.bool),
        "pooled_projections": _empty(1, 768),
        "guidance": _full(6000.0, 1, dtype=torch.float32),
    }


def _stable_diffusion_3() -> dict[str, Any]:
    return {
        "hidden_states": _empty(1, 16, 128, 128),
        "encoder_hidden_states": _empty(1, 328, 4096),
        "pooled_projections": _empty(1, 2048),
        "timestep": _full(500.0, 1, dtype=torch.float32),
    }


_24_HEADS = {"num_attention_heads": 24, "attention_head_dim": 128}
_QWEN_IMAGE = {"in_channels": 64, "out_channels": 16, "joint_attention_dim": 3584, **_24_HEADS}
_BOTH_KINDS = ("num_layers", "num_single_layers")

FULL_WIDTH = {
    "qwen-image": FullWidth("QwenImageTransformer2DModel", _qwen_image, _QWEN_IMAGE),
    "qwen-image, masked": FullWidth(
        "QwenImageTransformer2DModel", lambda: _qwen_image(batch=2, masked=True), _QWEN_IMAGE
    ),
    "qwen-image, 5 tokens of text": FullWidth("QwenImageTransformer2DModel", lambda: _qwen_image(text=5), _QWEN_IMAGE),
    "z-image": FullWidth("ZImageTransformer2DModel", _z_image, {"n_refiner_layers": 2}, ("n_layers",)),
    "wan": FullWidth("WanTransformer3DModel", _wan),
    "wan vace": FullWidth(
        "WanVACETransformer3DModel", _wan_vace, {"vace_layers": [0], "vace_in_channels": 96}
    ),
    "flux": FullWidth("FluxTransformer2DModel", _flux, {"guidance_embeds": True, **_24_HEADS}, _BOTH_KINDS),
    "flux-2": FullWidth("Flux2Transformer2DModel", _flux_2, depth=_BOTH_KINDS),
    "ltx": FullWidth("LTXVideoTransformer3DModel", _ltx),
    "hunyuan-video": FullWidth("HunyuanVideoTransformer3DModel", _hunyuan_video, depth=_BOTH_KINDS),
    "sd3": FullWidth(
        "SD3Transformer2DModel",
        _stable_diffusion_3,
        {
            "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_attention_heads": 24,
            "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 64,
        },
    ),
}  # fmt: skip
"""By name of the family, or of a variant of its inputs."""
