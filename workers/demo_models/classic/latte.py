"""The demo model of Latte."""

from typing import Any

import torch
from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae, t5_encoder

TRANSFORMER_GAINS = {"attn1.to_out": 4, "attn1.to_v": 3, "attn2.to_out": 4, "scale_shift_table": 3, "proj_out": 3}

FRAMES = 4
"""It makes as many as its positions have."""

REQUEST = {"num_frames": FRAMES}


def demo_pipeline() -> Any:
    """A `LattePipeline`, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,  # the second half is a variance, which the pipeline drops
        num_layers=2,
        cross_attention_dim=144,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_WIDTH,
        video_length=FRAMES,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    return LattePipeline(
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
        vae=image_vae(),
        text_encoder=t5_encoder(len(characters)),
        tokenizer=characters,
        transformer=transformer.eval(),
    )
