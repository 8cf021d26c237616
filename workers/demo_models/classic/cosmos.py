"""The demo models of Cosmos 1 and 2. Their folders name no guardrail: whoever serves them needs the real one."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLCosmos,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, t5_encoder
from workers.model.adapters.wan import demo_vae
from workers.passing_checker import PassingChecker

TRANSFORMER_GAINS = {"attn1.to_out": 4, "attn1.to_v": 3, "attn2.to_out": 4, "proj_out": 3}

FIRST = ("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline")
"""Those of Cosmos 1: another VAE, and a scheduler of their own."""


def demo_pipeline(pipeline: str = "CosmosTextToWorldPipeline") -> Any:
    """A pipeline of Cosmos, the same weights at every call.

    Args:
        pipeline: its class name.
    """
    characters = vocabulary.t5()
    sees = "VideoToWorld" in pipeline  # which frames it was given is one more channel
    torch.manual_seed(0)
    transformer = CosmosTransformer3DModel(
        in_channels=LATENT_CHANNELS + sees,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=12,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        extra_pos_embed_type="learnable" if pipeline in FIRST else None,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    return getattr(diffusers, pipeline)(
        scheduler=_scheduler(pipeline),
        vae=_vae() if pipeline in FIRST else demo_vae(),
        text_encoder=t5_encoder(len(characters)),
        tokenizer=characters,
        transformer=transformer.eval(),
        safety_checker=PassingChecker(),
    )


def _scheduler(pipeline: str) -> Any:
    if pipeline in FIRST:
        return EDMEulerScheduler(sigma_max=80.0, sigma_min=0.002, sigma_data=0.5, final_sigmas_type="sigma_min")
    return FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)


def _vae() -> Any:
    """An `AutoencoderKLCosmos` that reduces sizes and frames by 8."""
    return AutoencoderKLCosmos(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=2,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
        latents_mean=None,
        latents_std=None,
    ).eval()
