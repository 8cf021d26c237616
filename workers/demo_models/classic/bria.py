"""The demo models of Bria 3 and FIBO."""

from typing import Any

import diffusers
import torch
from diffusers import (
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae, t5_encoder
from workers.model.adapters.wan import demo_vae

TRANSFORMER_GAINS = {"norm1.linear": 3, "norm.linear": 3, "add_v_proj": 5, "to_out": 3, "proj_out": 2}

EMPTY = 128_000
"""The token that FIBO's pipelines write for an empty prompt."""

REQUEST = {"width": 96, "height": 128}


def demo_pipeline(name: str = "BriaPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    if name != "BriaPipeline":
        return _fibo(getattr(diffusers, name))
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = BriaTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=12,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=[4, 4, 4],
    )
    amplify(transformer, TRANSFORMER_GAINS)
    text_encoder = t5_encoder(len(characters))
    return BriaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=text_encoder,
        tokenizer=characters,
        transformer=transformer.eval(),
    )


def _fibo(kind: Any) -> Any:
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = BriaFiboTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=12,
        joint_attention_dim=2 * TEXT_WIDTH,
        axes_dims_rope=[4, 4, 4],
        text_encoder_dim=TEXT_WIDTH,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    text_encoder = SmolLM3ForCausalLM(
        SmolLM3Config(
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=EMPTY + 1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=demo_vae(in_channels=12, out_channels=12, patch_size=2, is_residual=True, scale_factor_spatial=16),
        text_encoder=text_encoder.eval(),
        tokenizer=characters,
        transformer=transformer.eval(),
    )
