"""The demo model of SkyReels V2."""

from typing import Any

import torch
from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, umt5_encoder
from workers.model.adapters.wan import demo_vae

TRANSFORMER_GAINS = {"attn1.to_out": 4, "attn2.to_out": 20, "attn2.to_v": 3, "scale_shift_table": 4, "proj_out": 3}


def demo_pipeline() -> Any:
    """A `SkyReelsV2Pipeline`, the same weights at every call."""
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=12,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=192,
        num_layers=2,
        rope_max_seq_len=512,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    return SkyReelsV2Pipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
        vae=demo_vae(),
        text_encoder=umt5_encoder(len(characters)),
        tokenizer=characters,
        transformer=transformer.eval(),
    )
