"""The demo models of HunyuanDiT, without and with a ControlNet."""

from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, HunyuanDiT2DModel
from transformers import BertConfig, BertModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, controlnet, image_vae, t5_encoder

TRANSFORMER_GAINS = {"attn1.to_out": 3, "attn2.to_out": 8, "attn2.to_v": 2}

REQUEST = {"extra_params": {"use_resolution_binning": False}}
"""Else the pipeline draws in one of the sizes that the real model was trained with, all of them large."""


def demo_pipeline(name: str = "HunyuanDiTPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=12,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        patch_size=2,
        sample_size=32,
        hidden_size=192,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        text_len=77,
        text_len_t5=256,
        use_style_cond_and_image_meta_size=False,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    text_encoder = BertModel(
        BertConfig(
            vocab_size=len(characters),
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    layers = transformer.config.num_layers
    beside = {}
    if "Control" in name:
        kind = diffusers.HunyuanDiT2DControlNetModel
        beside = {"controlnet": controlnet(kind, transformer, transformer_num_layers=layers)}
    return getattr(diffusers, name)(
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.03,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
        ),
        vae=image_vae(),
        text_encoder=text_encoder.eval(),
        tokenizer=characters,
        text_encoder_2=t5_encoder(len(characters)),
        tokenizer_2=characters,
        transformer=transformer.eval(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **beside,
    )
