"""The demo model of AnyFlow."""

from typing import Any

import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, umt5_encoder
from workers.model.adapters.wan import demo_vae

TRANSFORMER_GAINS = {"attn1.to_out": 12, "attn1.to_v": 2, "attn2.to_out": 10, "scale_shift_table": 4, "proj_out": 6}

CLIP_FRAMES = 5
"""Of nine: it goes on from the clip, and keeps all of it."""


def demo_pipeline() -> Any:
    """An `AnyFlowPipeline`, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = AnyFlowTransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=192,
        num_layers=2,
        rope_max_seq_len=512,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    return AnyFlowPipeline(
        scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        vae=demo_vae(),
        text_encoder=umt5_encoder(len(characters)),
        tokenizer=characters,
        transformer=transformer.eval(),
    )
