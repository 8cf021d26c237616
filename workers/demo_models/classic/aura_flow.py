"""The demo model of AuraFlow."""

from typing import Any

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae, umt5_encoder

TRANSFORMER_GAINS = {
    "context_embedder": 5,
    "norm1": 3,
    "add_k_proj": 3,
    "add_v_proj": 30,
    "to_out": 4,
    "to_v": 3,
    "proj_out": 2,
}


def demo_pipeline() -> Any:
    """An `AuraFlowPipeline`, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=12,
        num_attention_heads=12,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=144,
        pos_embed_max_size=1024,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    return AuraFlowPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=image_vae(),
        text_encoder=umt5_encoder(len(characters)),
        tokenizer=characters,
        transformer=transformer.eval(),
    )
