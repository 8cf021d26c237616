"""The demo models of LongCat-Image, from text and for edits."""

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImageTransformer2DModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import TEXT_WIDTH, amplify, image_vae, qwen_vl_encoder
from workers.demo_models.vision_language import qwen2_vl_processor

CHANNELS = 16
"""Of the latents; the pipeline takes no other number."""

TRANSFORMER_GAINS = {"context_embedder": 3, "norm1": 3, "norm.linear": 3, "add_v_proj": 5, "to_out": 5, "proj_out": 2}


def demo_pipeline(name: str = "LongCatImagePipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    tokenizer = vocabulary.qwen2()
    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=12,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=[4, 4, 4],
    )
    amplify(transformer, TRANSFORMER_GAINS)
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(CHANNELS),
        text_encoder=qwen_vl_encoder(tokenizer),
        tokenizer=tokenizer,
        # Without a picture it rewrites prompts, which spray does not have it do.
        text_processor=qwen2_vl_processor(tokenizer) if "Edit" in name else None,
        transformer=transformer.eval(),
    )
