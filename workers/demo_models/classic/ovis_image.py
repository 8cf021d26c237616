"""The demo model of Ovis-Image."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae, qwen3_encoder

CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"

TRANSFORMER_GAINS = {"context_embedder": 3, "norm1": 3, "norm.linear": 3, "add_v_proj": 5, "to_out": 5, "proj_out": 2}


def demo_pipeline() -> Any:
    """An `OvisImagePipeline`, the same weights at every call."""
    tokenizer = vocabulary.qwen2(chat_template=CHAT_TEMPLATE)
    torch.manual_seed(0)
    transformer = OvisImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=12,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 4),
    )
    amplify(transformer, TRANSFORMER_GAINS)
    text_encoder = qwen3_encoder(len(tokenizer))
    return OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
