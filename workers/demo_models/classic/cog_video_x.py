"""The demo models of CogVideoX."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, t5_encoder

TRANSFORMER_GAINS = {"text_proj": 3, "norm1.linear": 3, "to_out": 4, "to_v": 2, "proj_out": 3}


TWICE_AS_WIDE = ("CogVideoXImageToVideoPipeline", "CogVideoXFunControlPipeline")
"""Their transformers see other latents beside the noise."""


def demo_pipeline(name: str = "CogVideoXPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    scheduler = CogVideoXDDIMScheduler if "FunControl" in name else CogVideoXDPMScheduler
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS * (2 if name in TWICE_AS_WIDE else 1),
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=32,
        sample_height=32,
        sample_frames=9,
        use_rotary_positional_embeddings=True,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=1.0,
    )
    return getattr(diffusers, name)(
        scheduler=scheduler(prediction_type="v_prediction", snr_shift_scale=1.0),
        vae=vae.eval(),
        text_encoder=t5_encoder(len(characters)),
        tokenizer=characters,
        transformer=transformer.eval(),
    )
