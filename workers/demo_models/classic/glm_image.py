"""The demo model of GLM-Image: a language model draws tokens, of which the transformer makes the picture."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from transformers import (
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessor,
    GlmImageProcessor,
)

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae, t5_encoder

TRANSFORMER_GAINS = {"norm1.linear": 3, "to_out": 4, "to_v": 3, "proj_out": 3}

REQUEST = {"width": 96, "height": 128, "n": 1}
"""One picture: the call itself makes several of the tokens of the first, but we make each of its own."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)

NAMED = {
    "image_token": "<|image|>",
    "grid_bos_token": "<|grid_begin|>",
    "grid_eos_token": "<|grid_end|>",
}
"""Tokens by the names by which the processor asks the tokenizer for them."""

END = "<|image_end|>"

DRAWN = 8
"""Tokens of pictures. They are the first, so that none of those above is drawn."""


def demo_pipeline() -> Any:
    """A `GlmImagePipeline`, the same weights at every call."""
    characters = vocabulary.t5()
    words = vocabulary.qwen2(
        special=(*NAMED.values(), END),
        chat_template=CHAT_TEMPLATE,
        bos_token="<|im_start|>",
        model_specific_special_tokens=NAMED,
    )
    torch.manual_seed(0)
    transformer = GlmImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=12,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=32,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=DRAWN,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = image_vae()
    vae.register_to_config(latents_mean=[0.0] * LATENT_CHANNELS, latents_std=[1.0] * LATENT_CHANNELS)
    return GlmImagePipeline(
        tokenizer=characters,
        processor=GlmImageProcessor(GlmImageImageProcessor(), words, chat_template=CHAT_TEMPLATE),
        text_encoder=t5_encoder(len(characters)),
        vision_language_encoder=_language_model(words),
        vae=vae,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _language_model(words: Any) -> Any:
    """A `GlmImageForConditionalGeneration` of two layers. It never draws the token that ends a picture."""
    end = words.convert_tokens_to_ids(END)
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": TEXT_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vision_vocab_size": DRAWN,
            "eos_token_id": end,
            "pad_token_id": words.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "image_size": 64,
            "patch_size": 16,
        },
        vq_config={"embed_dim": 16, "num_embeddings": DRAWN, "latent_channels": 16},
        image_token_id=words.convert_tokens_to_ids(NAMED["image_token"]),
        image_start_token_id=words.bos_token_id,
        image_end_token_id=end,
    )
    return GlmImageForConditionalGeneration(config).eval()
