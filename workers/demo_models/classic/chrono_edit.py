"""The demo model of ChronoEdit."""

from typing import Any

import torch
from diffusers import ChronoEditPipeline, ChronoEditTransformer3DModel, FlowMatchEulerDiscreteScheduler

from workers.demo_models import vocabulary
from workers.demo_models.clip_vision import WIDTH, image_encoder, image_processor
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, umt5_encoder
from workers.model.adapters.wan import demo_vae

TRANSFORMER_GAINS = {"attn1.to_out": 6, "attn2.to_out": 20, "attn2.to_v": 3, "scale_shift_table": 4, "proj_out": 3}

REQUEST = {"num_frames": 5}


def demo_pipeline() -> Any:
    """A `ChronoEditPipeline`, the same weights at every call."""
    characters = vocabulary.t5()
    mask = 4  # of the frames that a latent frame is made of
    torch.manual_seed(0)
    transformer = ChronoEditTransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=12,
        in_channels=2 * LATENT_CHANNELS + mask,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=192,
        num_layers=2,
        image_dim=WIDTH,
        added_kv_proj_dim=144,
        rope_max_seq_len=512,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    return ChronoEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=demo_vae(),
        text_encoder=umt5_encoder(len(characters)),
        tokenizer=characters,
        image_encoder=image_encoder(),
        image_processor=image_processor(),
        transformer=transformer.eval(),
    )
