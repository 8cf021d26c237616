"""The demo models of HunyuanVideo 1.5."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Transformer3DModel,
)

from workers.demo_models import vocabulary
from workers.demo_models.clip_vision import WIDTH, siglip_encoder, siglip_processor
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, qwen_vl_encoder, t5_encoder

CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"

TRANSFORMER_GAINS = {"norm1": 3, "add_k_proj": 3, "add_v_proj": 10, "to_out": 4, "proj_out": 2}

REQUEST = {"width": 96, "height": 64, "num_frames": 5}


def demo_pipeline(name: str = "HunyuanVideo15Pipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    looks = name == "HunyuanVideo15ImageToVideoPipeline"
    tokenizer, characters = vocabulary.qwen2(chat_template=CHAT_TEMPLATE), vocabulary.t5()
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=12,
        attention_head_dim=12,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=TEXT_WIDTH,
        image_embed_dim=WIDTH if looks else TEXT_WIDTH,
        rope_axes_dim=(4, 4, 4),
        task_type="i2v" if looks else "t2v",
        target_size=80 if looks else 640,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
        scaling_factor=1.0,
    )
    more = {"image_encoder": siglip_encoder(), "feature_extractor": siglip_processor()} if looks else {}
    return getattr(diffusers, name)(
        text_encoder=qwen_vl_encoder(tokenizer, layers=3).model.language_model,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=t5_encoder(len(characters)),
        tokenizer_2=characters,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        **more,
    )
