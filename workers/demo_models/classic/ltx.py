"""The demo model of LTX-Video."""

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, t5_encoder

TRANSFORMER_GAINS = {
    "attn1.to_out": 6,
    "attn2.to_out": 40,
    "attn2.to_v": 2,
    "caption_projection": 3,
    "scale_shift_table": 4,
    "proj_out": 2,
}

REQUEST = {"width": 96, "height": 64}


def demo_pipeline(name: str = "LTXPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=12,
        attention_head_dim=12,
        cross_attention_dim=144,
        caption_channels=TEXT_WIDTH,
        num_layers=2,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    vae.latents_mean.copy_(torch.linspace(-0.2, 0.2, LATENT_CHANNELS))
    text_encoder = t5_encoder(len(characters))
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting="Condition" not in name),
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=characters,
        transformer=transformer.eval(),
    )
