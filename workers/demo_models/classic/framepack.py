"""The demo model of HunyuanVideo Framepack."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from workers.demo_models import vocabulary
from workers.demo_models.clip_vision import WIDTH, siglip_encoder, siglip_processor
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify

TRANSFORMER_GAINS = {"norm1": 3, "norm.linear": 3, "add_k_proj": 3, "add_v_proj": 10, "to_out": 4, "proj_out": 2}

REQUEST = {"num_frames": 37}
"""More than one window of 33."""

ROLES = {"HunyuanVideoFramepackPipeline": ("last_image",)}


def demo_pipeline() -> Any:
    """A `HunyuanVideoFramepackPipeline`, the same weights at every call."""
    words, tokenizer = vocabulary.clip(), vocabulary.qwen2()
    torch.manual_seed(0)
    transformer = HunyuanVideoFramepackTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        attention_head_dim=12,
        num_attention_heads=12,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 4, 4),
        has_image_proj=True,
        image_proj_dim=WIDTH,
        has_clean_x_embedder=True,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.0,
    )
    pooled = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return HunyuanVideoFramepackPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=LlamaModel(text).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModel(pooled).eval(),
        tokenizer_2=words,
        image_encoder=siglip_encoder(),
        feature_extractor=siglip_processor(),
        transformer=transformer.eval(),
    )
