"""The demo model of Lumina 2."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from transformers import Gemma2Config, Gemma2Model

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae

TRANSFORMER_GAINS = {"caption_embedder": 10, "norm1.linear": 3, "to_out": 4, "to_v": 3, "norm_out.linear_2": 2}


def demo_pipeline() -> Any:
    """A `Lumina2Pipeline`, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=32,
        in_channels=LATENT_CHANNELS,
        hidden_size=144,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=12,
        num_kv_heads=6,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(512, 64, 64),
        cap_feat_dim=TEXT_WIDTH,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    text_encoder = Gemma2Model(
        Gemma2Config(
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
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=image_vae(),
        text_encoder=text_encoder.eval(),
        tokenizer=characters,
        transformer=transformer.eval(),
    )
