"""The demo model of Bria FIBO 2, which draws from a caption in JSON or in words, or edits up to five pictures."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify
from workers.demo_models.vision_language import qwen3_vl_encoder, qwen3_vl_processor

TRANSFORMER_GAINS = {"adaLN_modulation": 3, "attention.to_v": 3, "attention.to_out": 4, "cap_proj": 3, "linear": 2}

LAYERS = 36
"""Of the text encoder: the pipeline reads the 35th."""

READ_TOGETHER = 3
"""Layers of the text encoder, of which each of the transformer's text inputs is made."""

ROLES = {"BriaFibo2Pipeline": ("mask",)}


def demo_pipeline() -> Any:
    """A `BriaFibo2Pipeline`, the same weights at every call."""
    tokenizer = vocabulary.qwen2()
    torch.manual_seed(0)
    transformer = BriaFibo2Transformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=12 * 12,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=12,
        cap_feat_dim=READ_TOGETHER * TEXT_WIDTH,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=16,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=256,
        axes_dims=(4, 4, 4),
        axes_lens=(64, 64, 64),
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=4
    )
    return BriaFibo2Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=qwen3_vl_encoder(tokenizer, LAYERS),
        processor=qwen3_vl_processor(tokenizer),
    )
