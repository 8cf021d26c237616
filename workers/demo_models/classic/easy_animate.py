"""The demo model of EasyAnimate."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, qwen3_encoder

CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content[0].text }}<|im_end|>{% endfor %}"

TRANSFORMER_GAINS = {"text_proj": 3, "norm1.linear": 3, "to_out": 4, "to_v": 3, "proj_out": 3}

REQUEST = {"num_frames": 5}


def demo_pipeline() -> Any:
    """An `EasyAnimatePipeline`, the same weights at every call."""
    tokenizer = vocabulary.qwen2(chat_template=CHAT_TEMPLATE)
    torch.manual_seed(0)
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLMagvit(
        block_out_channels=[8, 8, 8, 8],
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=1.0,
    )
    text_encoder = qwen3_encoder(len(tokenizer))
    return EasyAnimatePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
