"""The demo model of LongCat-Image, of whose parts that of its edits is built as well."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import TEXT_WIDTH, amplify, image_vae, qwen_vl_encoder
from workers.demo_models.vision_language import qwen2_vl_processor

CHANNELS = 16
"""Of the latents; the pipeline takes no other number."""

TRANSFORMER_GAINS = {"context_embedder": 3, "norm1": 3, "norm.linear": 3, "add_v_proj": 5, "to_out": 5, "proj_out": 2}


def demo_pipeline() -> Any:
    """A `LongCatImagePipeline`, the same weights at every call."""
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
    return LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(CHANNELS),
        text_encoder=qwen_vl_encoder(tokenizer),
        tokenizer=tokenizer,
        text_processor=qwen2_vl_processor(tokenizer),
        transformer=transformer.eval(),
    )
