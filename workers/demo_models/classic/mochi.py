"""The demo model of Mochi."""

from typing import Any

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from torch import nn

from workers.demo_models import vocabulary
from workers.demo_models.parts import TEXT_WIDTH, amplify, t5_encoder

LATENT_CHANNELS = 12
"""The pipeline counts on so many."""

TRANSFORMER_GAINS = {"norm1": 3, "to_q": 2, "to_v": 4, "to_out": 3, "add_v_proj": 3, "proj_out": 3}

REQUEST = {"num_frames": 7}


def demo_pipeline() -> Any:
    """A `MochiPipeline`, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=12,
        num_layers=3,
        pooled_projection_dim=48,
        in_channels=LATENT_CHANNELS,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=32,
    )
    nn.init.normal_(transformer.pos_frequencies)
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=1.0,
    )
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae.eval(),
        text_encoder=t5_encoder(len(characters)),
        tokenizer=characters,
        transformer=transformer.eval(),
    )
