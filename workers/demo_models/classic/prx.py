"""The demo model of PRX. It draws 256 x 256 pixels, and scales them."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXTransformer2DModel
from transformers import T5GemmaConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae

TRANSFORMER_GAINS = {"attention.": 2, "modulation": 2}

REQUEST = {"n": 1}
"""Where it guides, its own call makes one picture and fails if asked for more; a gang makes several one by one."""


def demo_pipeline() -> Any:
    """A `PRXPipeline`, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = PRXTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        patch_size=2,
        context_in_dim=TEXT_WIDTH,
        hidden_size=144,
        mlp_ratio=2.0,
        num_heads=12,
        depth=2,
        axes_dim=[6, 6],
    )
    for parameter in transformer.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    amplify(transformer, TRANSFORMER_GAINS)
    return PRXPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=_encoder(len(characters)),
        tokenizer=characters,
        vae=image_vae(),
        default_sample_size=256,
    )


def _encoder(tokens: int) -> Any:
    """A `T5GemmaEncoder` of two layers; its folder has the config of encoder and decoder, as those of real models."""
    half = {
        "vocab_size": tokens,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
    }
    config = T5GemmaConfig(encoder=half, decoder=half, vocab_size=tokens)
    encoder = T5GemmaEncoder(config.encoder).eval()
    encoder.config = config
    return encoder
