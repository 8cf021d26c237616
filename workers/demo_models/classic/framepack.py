"""The demo model of HunyuanVideo Framepack."""

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
)
from transformers import CLIPTextModel, LlamaModel

from workers.demo_models import vocabulary
from workers.demo_models.classic.hunyuan_video import TRANSFORMER_GAINS, pooled_config, text_config, video_vae
from workers.demo_models.clip_vision import WIDTH, siglip_encoder, siglip_processor
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify

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
    vae = video_vae()
    return HunyuanVideoFramepackPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=LlamaModel(text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModel(pooled_config(words)).eval(),
        tokenizer_2=words,
        image_encoder=siglip_encoder(),
        feature_extractor=siglip_processor(),
        transformer=transformer.eval(),
    )
