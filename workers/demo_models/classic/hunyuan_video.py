"""The demo models of HunyuanVideo."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as from_picture
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify

TRANSFORMER_GAINS = {"norm1": 3, "norm.linear": 3, "add_k_proj": 3, "add_v_proj": 10, "to_out": 4, "proj_out": 2}

REQUEST = {"num_frames": 5}

LLAVA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")

EDGE, PATCH = 336, 14
"""Pixels of the picture that the text encoder looks at, and of one of its patches: the pipeline counts on 576."""


def video_vae() -> Any:
    """A tiny VAE of this family."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.0,
    )


def pooled_config(words: Any) -> CLIPTextConfig:
    """Of the second text encoder, with these words."""
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )


def text_config(tokenizer: Any) -> LlamaConfig:
    """Of the first text encoder, with these tokens."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )


def demo_pipeline(name: str = "HunyuanVideoPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    looks = name == "HunyuanVideoImageToVideoPipeline"
    words, tokenizer = vocabulary.clip(), _llava_words() if looks else vocabulary.qwen2()
    beside = LATENT_CHANNELS if "ImageToVideo" in name else 0  # the picture, and where it is
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS + beside + int(looks),
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        attention_head_dim=12,
        num_attention_heads=12,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 4, 4),
        image_condition_type="latent_concat" if looks else None,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = video_vae()
    pooled, text = pooled_config(words), text_config(tokenizer)
    more = {}
    if looks:
        more = {"image_processor": CLIPImageProcessor(size={"shortest_edge": EDGE}, crop_size=EDGE)}
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=vae.eval(),
        text_encoder=_llava(text, tokenizer) if looks else LlamaModel(text).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModel(pooled).eval(),
        tokenizer_2=words,
        transformer=transformer.eval(),
        **more,
    )


def _llava_words() -> Any:
    """A tokenizer for the prompt of pipelines that begin with a picture."""
    return vocabulary.qwen2(str(from_picture.DEFAULT_PROMPT_TEMPLATE["template"]), LLAVA_TOKENS)


def _llava(text: LlamaConfig, tokenizer: Any) -> Any:
    """A `LlavaForConditionalGeneration` that reads by this text encoder."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=EDGE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    config.pad_token_id = tokenizer.pad_token_id
    return LlavaForConditionalGeneration(config).eval()
