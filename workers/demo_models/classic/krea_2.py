"""The demo model of Krea 2."""

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify

TRANSFORMER_GAINS = {"txt_in": 2, "time_mod_proj": 2, "to_out": 4, "to_v": 3, "final_layer.linear": 2}


def demo_pipeline() -> Any:
    """A `Krea2Pipeline`, the same weights at every call."""
    tokenizer = vocabulary.qwen2()
    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=12,
        num_key_value_heads=6,
        intermediate_size=288,
        timestep_embed_dim=64,
        text_hidden_dim=TEXT_WIDTH,
        num_text_layers=2,
        text_num_attention_heads=4,
        text_num_key_value_heads=4,
        text_intermediate_size=TEXT_WIDTH,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 4),
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    amplify(vae, {"decoder.conv_out": 3})
    text = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": len(tokenizer),
        "rope_scaling": {"mrope_section": [3, 3, 2], "rope_type": "default"},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    text_encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        text_encoder_select_layers=(1, 2),
    )
