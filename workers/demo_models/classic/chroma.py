"""The demo model of Chroma."""

from typing import Any

import diffusers
import torch
from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae, t5_encoder

TRANSFORMER_GAINS = {"distilled_guidance_layer": 2, "add_v_proj": 5, "to_out": 3, "proj_out": 2}


def demo_pipeline(name: str = "ChromaPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=12,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    text_encoder = t5_encoder(len(characters))
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=text_encoder,
        tokenizer=characters,
        transformer=transformer.eval(),
    )
