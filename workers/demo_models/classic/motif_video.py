"""The demo models of Motif-Video, with all that its transformer may have: a decoder, cross-attention to the text."""

from typing import Any

import diffusers
import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, MotifVideoTransformer3DModel
from transformers import SiglipVisionConfig, T5Gemma2Encoder
from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2EncoderConfig, T5Gemma2TextConfig

from workers.demo_models import vocabulary
from workers.demo_models.clip_vision import EDGE, WIDTH, siglip_processor
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify
from workers.model.adapters.wan import demo_vae

TRANSFORMER_GAINS = {"norm1": 3, "norm.linear": 3, "add_v_proj": 3, "to_v": 3, "to_out": 4, "proj_out": 2}


def demo_pipeline(name: str = "MotifVideoPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    looks = name == "MotifVideoImage2VideoPipeline"
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = MotifVideoTransformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1,  # the noise, the picture, and where it is
        out_channels=LATENT_CHANNELS,
        num_attention_heads=12,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=3,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        image_embed_dim=WIDTH if looks else None,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=demo_vae(),
        text_encoder=_encoder(len(characters)),
        tokenizer=characters,
        transformer=transformer.eval(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        feature_extractor=siglip_processor(),
    )


def _encoder(tokens: int) -> Any:
    """A `T5Gemma2Encoder` of two layers, which reads texts and looks at pictures."""
    text = T5Gemma2TextConfig(
        vocab_size=tokens,
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=2048,
        dropout_rate=0.0,
    )
    vision = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=EDGE,
        patch_size=8,
    )
    return T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=text, vision_config=vision, mm_tokens_per_image=4)).eval()
