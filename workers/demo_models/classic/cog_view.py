"""The demo models of CogView 4 and 3 Plus."""

from typing import Any

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import GlmConfig, GlmModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae, t5_encoder

TRANSFORMER_GAINS = {"text_proj": 3, "norm1.linear": 3, "to_out": 4, "to_v": 3, "proj_out": 3}

SIZES = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 12,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 64,
    "condition_dim": 16,
    "pos_embed_max_size": 64,
    "sample_size": 32,
}


def demo_pipeline(name: str = "CogView4Pipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    if name == "CogView3PlusPipeline":
        return _cog_view_3()
    characters = vocabulary.t5()  # it ends each prompt with a token, as GLM's begins it: none is empty
    torch.manual_seed(0)
    channels = LATENT_CHANNELS * (2 if "Control" in name else 1)  # the noise, and the picture that controls it
    transformer = CogView4Transformer2DModel(**SIZES | {"in_channels": channels}, rope_axes_dim=(64, 64))
    amplify(transformer, TRANSFORMER_GAINS)
    text_encoder = GlmModel(
        GlmConfig(
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=len(characters),
            max_position_embeddings=2048,
            pad_token_id=0,
            eos_token_id=[0],
        )
    )
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=text_encoder.eval(),
        tokenizer=characters,
        transformer=transformer.eval(),
    )


def _cog_view_3() -> Any:
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = CogView3PlusTransformer2DModel(**SIZES)
    amplify(transformer, TRANSFORMER_GAINS)
    return CogView3PlusPipeline(
        scheduler=CogVideoXDDIMScheduler(),
        vae=image_vae(),
        text_encoder=t5_encoder(len(characters)),
        tokenizer=characters,
        transformer=transformer.eval(),
    )
