"""The demo model of PixArt alpha and sigma."""

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae, t5_encoder

TRANSFORMER_GAINS = {"attn1.to_out": 4, "attn2.to_out": 20, "attn2.to_v": 3, "scale_shift_table": 2, "proj_out": 2}


def demo_pipeline() -> Any:
    """A `PixArtAlphaPipeline`, the same weights at every call. It draws 256 x 256 pixels, and scales them."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=12,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=2,
        cross_attention_dim=144,
        sample_size=32,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    return PixArtAlphaPipeline(
        scheduler=DPMSolverMultistepScheduler(),
        vae=image_vae(),
        text_encoder=t5_encoder(len(characters)),
        tokenizer=characters,
        transformer=transformer.eval(),
    )
