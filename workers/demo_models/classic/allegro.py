"""The demo model of Allegro."""

from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    EulerAncestralDiscreteScheduler,
)

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, t5_encoder

TRANSFORMER_GAINS = {"attn1.to_out": 4, "attn1.to_v": 3, "attn2.to_out": 4, "scale_shift_table": 3, "proj_out": 3}

TILE = 160
"""Pixels of an edge; its VAE decodes tiles that lie 40 rows or 80 columns apart."""

REQUEST = {"width": TILE + 80, "height": TILE, "num_frames": 24}


def demo_pipeline() -> Any:
    """An `AllegroPipeline`, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=24,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        cross_attention_dim=288,
        sample_height=TILE // 8,
        sample_width=TILE // 8,
        sample_frames=6,
        caption_channels=TEXT_WIDTH,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=TILE,
        scaling_factor=1.0,
    )
    return AllegroPipeline(
        scheduler=EulerAncestralDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=t5_encoder(len(characters)),
        tokenizer=characters,
        transformer=transformer.eval(),
    )
