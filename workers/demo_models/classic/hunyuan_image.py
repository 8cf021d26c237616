"""The demo models of HunyuanImage and its refiner."""

from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageRefinerPipeline,
    HunyuanImageTransformer2DModel,
)

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, qwen_vl_encoder, t5_encoder

TRANSFORMER_GAINS = {"norm1": 3, "norm.linear": 3, "add_k_proj": 3, "add_v_proj": 10, "to_out": 4, "proj_out": 2}

REQUEST = {"width": 128, "height": 192}


def demo_pipeline(name: str = "HunyuanImagePipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    if name == "HunyuanImageRefinerPipeline":
        return _refiner()
    tokenizer, characters = vocabulary.qwen2(), vocabulary.t5()
    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=12,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=TEXT_WIDTH,
        rope_axes_dim=(8, 8),
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 32, 32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=32,
        sample_size=64,
        scaling_factor=1.0,
    )
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae.eval(),
        text_encoder=qwen_vl_encoder(tokenizer, layers=3),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(len(characters)),
        tokenizer_2=characters,
        transformer=transformer.eval(),
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
    )


def _refiner() -> Any:
    """Its latents are those of two frames side by side, and the picture's stand beside the noise."""
    tokenizer = vocabulary.qwen2()
    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_attention_heads=12,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1, 1),
        text_embed_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=True,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLHunyuanImageRefiner(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
        scaling_factor=1.0,
    )
    return HunyuanImageRefinerPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=vae.eval(),
        text_encoder=qwen_vl_encoder(tokenizer, layers=3),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
    )
