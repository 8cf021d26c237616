"""Qwen-Image: how its pipeline is run, and its demo model."""

from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, controlnet, qwen_vl_encoder
from workers.model.adapters.pipeline_adapter import PipelineAdapter
from workers.model.prompts import TEMPLATE

TRANSFORMER_GAINS = {"_mod.": 3, "norm_": 1.5, "add_k_proj": 3, "add_v_proj": 10, "to_out": 4, "proj_out": 4}


class QwenImageAdapter(PipelineAdapter):
    """Its tokenizer keeps 1024 tokens of a prompt, of which the pipeline passes on 512."""

    most_tokens = MappingProxyType({"tokenizer": TEMPLATE + 512})
    vae_of_videos = True

    def pack(self, pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
        """See `PipelineAdapter.pack`."""
        tokens: torch.Tensor = pipeline.pachifier.pack_latents(latents)
        return tokens


ADAPTER = QwenImageAdapter


def demo_pipeline(name: str = "QwenImagePipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    edits = "Edit" in name
    tokenizer = vocabulary.qwen2(vocabulary.EDIT_WORDS if edits else vocabulary.SYSTEM_WORDS)
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=12,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t="Plus" in name,  # as the latest of them
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    text_encoder = qwen_vl_encoder(tokenizer)
    amplify(transformer, TRANSFORMER_GAINS)
    amplify(vae, {"decoder.conv_out": 3})
    beside = {"controlnet": _controlnet(transformer, "Inpaint" in name)} if "Control" in name else {}
    if edits:
        from workers.demo_models.vision_language import qwen2_vl_processor  # here: ranks load this file, and few edit

        beside["processor"] = qwen2_vl_processor(tokenizer)
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        **beside,
    )


def _controlnet(transformer: Any, masked: bool) -> Any:
    """One of two layers; `masked`: it takes a mask beside the picture, as latents have cells."""
    cells = transformer.config.patch_size**2 if masked else 0
    return controlnet(diffusers.QwenImageControlNetModel, transformer, num_layers=2, extra_condition_channels=cells)
