"""The demo model of JoyImage-Edit, whose sizes are those of a list."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    JoyImageEditPipeline,
    JoyImageEditTransformer3DModel,
)

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify
from workers.demo_models.vision_language import qwen3_vl_encoder, qwen3_vl_processor

TRANSFORMER_GAINS = {"attn.": 2, "proj_out": 2}


def demo_pipeline() -> Any:
    """A `JoyImageEditPipeline`, the same weights at every call."""
    tokenizer = vocabulary.qwen2()
    torch.manual_seed(0)
    transformer = JoyImageEditTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        hidden_size=12 * 12,
        num_attention_heads=12,
        text_dim=TEXT_WIDTH,
        mlp_width_ratio=2.0,
        num_layers=2,
        rope_dim_list=[4, 4, 4],
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    return JoyImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=qwen3_vl_encoder(tokenizer, 2),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        processor=qwen3_vl_processor(tokenizer),
    )
