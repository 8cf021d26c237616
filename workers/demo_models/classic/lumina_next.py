"""The demo model of Lumina Next."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel, LuminaPipeline
from torch import nn
from transformers import GemmaConfig, GemmaModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae

TRANSFORMER_GAINS = {"attn1.to_q": 3, "attn1.to_v": 4, "attn2.to_out": 4, "norm1.linear": 3, "norm_out.linear_2": 3}


def demo_pipeline() -> Any:
    """A `LuminaPipeline`, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = LuminaNextDiT2DModel(
        sample_size=4,  # fewer tokens than are asked for, so that the scale of attention depends on how many there are
        in_channels=LATENT_CHANNELS,
        hidden_size=144,
        num_layers=2,
        num_attention_heads=12,
        num_kv_heads=6,
        multiple_of=16,
        cross_attention_dim=TEXT_WIDTH,
    )
    nn.init.normal_(transformer.pad_token)  # the model leaves it uninitialized
    for layer in transformer.layers:
        nn.init.constant_(layer.gate, 0.5)  # 0 would hide the prompt
    amplify(transformer, TRANSFORMER_GAINS)
    text_encoder = GemmaModel(
        GemmaConfig(
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=len(characters),
            pad_token_id=0,
        )
    )
    return LuminaPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=text_encoder.eval(),
        tokenizer=characters,
    )
