"""The demo models of SkyReels V2."""

from typing import Any

import diffusers
import torch
from diffusers import SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

from workers.demo_models import vocabulary
from workers.demo_models.clip_vision import WIDTH, image_encoder, image_processor
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, umt5_encoder
from workers.model.adapters.wan import demo_vae

REQUESTS = {
    "SkyReelsV2DiffusionForcingPipeline": {"num_frames": 101, "extra_params": {"overlap_history": 17}},  # two windows
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": {"extra_params": {"overlap_history": 5}},
}

TRANSFORMER_GAINS = {"attn1.to_out": 4, "attn2.to_out": 20, "attn2.to_v": 3, "scale_shift_table": 4, "proj_out": 3}


def demo_pipeline(name: str = "SkyReelsV2Pipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    from_picture = name == "SkyReelsV2ImageToVideoPipeline"
    mask = 4  # of the frames that a latent frame is made of
    looks = {"image_dim": WIDTH, "added_kv_proj_dim": 144} if from_picture else {}
    characters = vocabulary.t5()
    torch.manual_seed(0)
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=12,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS + (mask + LATENT_CHANNELS if from_picture else 0),
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=192,
        num_layers=2,
        rope_max_seq_len=512,
        inject_sample_info="Forcing" in name,
        **looks,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    parts = {
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
        "vae": demo_vae(),
        "text_encoder": umt5_encoder(len(characters)),
        "tokenizer": characters,
        "transformer": transformer.eval(),
    }
    sees = {"image_encoder": image_encoder(), "image_processor": image_processor()} if from_picture else {}
    return getattr(diffusers, name)(**parts, **sees)
