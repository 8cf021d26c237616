"""The demo model of Ideogram 4, which has a second transformer for the branch without a prompt."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
)
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS

from workers.demo_models import vocabulary
from workers.demo_models.classic.flux_2 import CHAT_TEMPLATE_OF_PARTS
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify
from workers.demo_models.vision_language import qwen3_vl_encoder

TRANSFORMER_GAINS = {"attention.": 3, "final_layer.linear": 2}


def demo_pipeline() -> Any:
    """An `Ideogram4Pipeline`, the same weights at every call."""
    tokenizer = vocabulary.qwen2(chat_template=CHAT_TEMPLATE_OF_PARTS)
    torch.manual_seed(0)
    transformer, unconditional = _transformer(), _transformer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=4
    )
    vae.bn.running_mean.copy_(torch.linspace(-0.2, 0.2, 4 * LATENT_CHANNELS))
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=qwen3_vl_encoder(tokenizer, QWEN3_VL_ACTIVATION_LAYERS[-1] + 1).model,
        tokenizer=tokenizer,
        transformer=transformer,
        unconditional_transformer=unconditional,
    )


def _transformer() -> Any:
    """One of the two. Their weights differ, so that an exchange of both shows."""
    transformer = Ideogram4Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=12,
        intermediate_size=288,
        adaln_dim=32,
        llm_features_dim=len(QWEN3_VL_ACTIVATION_LAYERS) * TEXT_WIDTH,
        mrope_section=(2, 2, 2),
    )
    amplify(transformer, TRANSFORMER_GAINS)
    return transformer.eval()
