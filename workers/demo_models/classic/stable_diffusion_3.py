"""The demo model of Stable Diffusion 3.5 medium: its first block also attends to the image alone."""

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, controlnet, image_vae, t5_encoder

TRANSFORMER_GAINS = {"norm1": 3, "add_k_proj": 3, "add_v_proj": 10, "to_out": 4, "proj_out": 3}


def demo_pipeline(name: str = "StableDiffusion3Pipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    channels = 16 if "Inpaint" in name else LATENT_CHANNELS  # such a pipeline knows its transformer by them
    words, characters = vocabulary.clip(), vocabulary.t5()
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        in_channels=channels,
        out_channels=channels,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=12,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=144,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    amplify(transformer, TRANSFORMER_GAINS)
    text_encoder_3 = t5_encoder(len(characters))
    beside = {"controlnet": _controlnet(transformer, "Inpaint" in name)} if "Control" in name else {}
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(channels),
        text_encoder=_clip(words),
        tokenizer=words,
        text_encoder_2=_clip(words),
        tokenizer_2=words,
        text_encoder_3=text_encoder_3,
        tokenizer_3=characters,
        transformer=transformer.eval(),
        **beside,
    )


def _controlnet(transformer: Any, masked: bool) -> Any:
    """One of two plain layers; `masked`: it takes a mask beside the picture."""
    beside = {"extra_conditioning_channels": int(masked), "dual_attention_layers": ()}
    return controlnet(diffusers.SD3ControlNetModel, transformer, num_layers=2, **beside)


def _clip(words: Any) -> Any:
    """Half as wide as the text: the pipeline puts two side by side."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH // 2,
        intermediate_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()
