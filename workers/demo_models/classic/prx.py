"""The demo models of PRX, which draws 256 x 256 pixels, and PRX Pixel, 1024 x 1024 without a VAE. Both scale them."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXPixelPipeline, PRXTransformer2DModel
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel, T5GemmaConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae

TRANSFORMER_GAINS = {"attention.": 2, "modulation": 2}

REQUEST = {"n": 1}
"""Where it guides, its own call makes one picture and fails if asked for more; a gang makes several one by one."""


REQUESTS = {"PRXPixelPipeline": {"width": 64, "height": 96}}
"""Of its patches."""


def demo_pipeline(name: str = "PRXPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    if name == "PRXPixelPipeline":
        return _of_pixels()
    characters = vocabulary.t5()
    return PRXPipeline(
        transformer=_transformer(in_channels=LATENT_CHANNELS, patch_size=2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=_encoder(len(characters)),
        tokenizer=characters,
        vae=image_vae(),
        default_sample_size=256,
    )


def _of_pixels() -> Any:
    """A `PRXPixelPipeline`."""
    tokenizer = vocabulary.qwen2()
    transformer = _transformer(in_channels=3, patch_size=32, bottleneck_size=32, resolution_embeds=True)
    config = Qwen3VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]},
    )
    return PRXPixelPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=Qwen3VLTextModel(config).eval(),
        tokenizer=tokenizer,
        prompt_max_tokens=64,
    )


def _transformer(**init: Any) -> Any:
    torch.manual_seed(0)
    transformer = PRXTransformer2DModel(
        **init, context_in_dim=TEXT_WIDTH, hidden_size=144, mlp_ratio=2.0, num_heads=12, depth=2, axes_dim=[6, 6]
    )
    for parameter in transformer.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    amplify(transformer, TRANSFORMER_GAINS)
    return transformer.eval()


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
