"""The demo model of Ernie-Image."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, qwen3_encoder

TRANSFORMER_GAINS = {"text_proj": 3, "to_out": 4, "to_v": 3}


def demo_pipeline() -> Any:
    """An `ErnieImagePipeline`, the same weights at every call."""
    tokenizer = vocabulary.qwen2()
    torch.manual_seed(0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=144,
        num_attention_heads=12,
        num_layers=2,
        ffn_hidden_size=288,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=4 * LATENT_CHANNELS,
        text_in_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 4, 4),
    )
    for layer in (transformer.adaLN_modulation[-1], transformer.final_linear):  # they begin as zeros
        nn.init.normal_(layer.weight, std=0.1)
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    text_encoder = qwen3_encoder(len(tokenizer))
    return ErnieImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
