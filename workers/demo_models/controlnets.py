"""ControlNets of the demo models: tiny, each made for a demo model's transformer, the same weights at every call."""

from typing import Any

import diffusers
import torch
from torch import nn

MODES = 3
"""Kinds of control among which a request chooses, in a ControlNet that has several."""


def flux(transformer: Any, several: bool) -> Any:
    """For Flux.1.

    Args:
        transformer: the demo model's.
        several: it has `MODES` kinds of control, and must be told one.
    """
    keys: tuple[str, ...] = (
        "in_channels",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
    )
    keys += ("axes_dims_rope", "guidance_embeds")
    modes = MODES if several else None
    return _made(diffusers.FluxControlNetModel, transformer, keys, num_layers=1, num_single_layers=1, num_mode=modes)


def qwen_image(transformer: Any, masked: bool) -> Any:
    """For Qwen-Image; `masked`: it takes a mask beside the picture."""
    keys: tuple[str, ...] = ("patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads")
    keys += ("joint_attention_dim", "axes_dims_rope")
    cells = transformer.config.patch_size**2
    beside = cells if masked else 0
    return _made(diffusers.QwenImageControlNetModel, transformer, keys, num_layers=2, extra_condition_channels=beside)


def stable_diffusion_3(transformer: Any, masked: bool) -> Any:
    """For Stable Diffusion 3; `masked`: it takes a mask beside the picture."""
    keys: tuple[str, ...] = (
        "sample_size",
        "in_channels",
        "out_channels",
        "attention_head_dim",
        "num_attention_heads",
        "qk_norm",
    )
    keys += ("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size")
    return _made(diffusers.SD3ControlNetModel, transformer, keys, num_layers=2, extra_conditioning_channels=int(masked))


def hunyuan_dit(transformer: Any) -> Any:
    """For HunyuanDiT."""
    keys: tuple[str, ...] = (
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "patch_size",
        "sample_size",
        "hidden_size",
    )
    keys += ("mlp_ratio", "cross_attention_dim", "cross_attention_dim_t5", "pooled_projection_dim")
    keys += ("text_len", "text_len_t5", "use_style_cond_and_image_meta_size")
    layers = transformer.config.num_layers
    return _made(diffusers.HunyuanDiT2DControlNetModel, transformer, keys, transformer_num_layers=layers)


def z_image(transformer: Any, masked: bool) -> Any:
    """For Z-Image, of which it borrows embeddings and refiners.

    Args:
        transformer: the demo model's.
        masked: it takes a mask and a picture beside the one of control, and refines them together with the noise, as
            the second version does.
    """
    keys: tuple[str, ...] = ("dim", "n_heads", "n_kv_heads", "n_refiner_layers")
    channels = transformer.config.in_channels
    return _made(
        diffusers.ZImageControlNetModel,
        transformer,
        keys,
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=2 * channels + 1 if masked else channels,
        add_control_noise_refiner="control_noise_refiner" if masked else None,
    )


def _made(kind: Any, transformer: Any, keys: tuple[str, ...], **init: Any) -> Any:
    """A ControlNet with these settings of the transformer. What begins as zeros is drawn, or it would add nothing."""
    torch.manual_seed(1)
    controlnet = kind(**{key: transformer.config[key] for key in keys}, **init)
    for parameter in controlnet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return controlnet.eval()
