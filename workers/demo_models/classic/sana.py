"""The demo models of Sana and SANA-Video, with a ControlNet where the pipeline takes one."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
    SanaVideoTransformer3DModel,
    SCMScheduler,
)
from transformers import Gemma2Config, Gemma2Model

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, controlnet
from workers.model.adapters.wan import demo_vae

TRANSFORMER_GAINS = {"attn1.to_out": 3, "attn1.to_v": 2, "conv_depth": 2, "conv_temp": 2, "proj_out": 2}

REQUEST = {"width": 96, "height": 128, "extra_params": {"use_resolution_binning": False}}
"""Else the pipelines draw in one of the sizes that the real models were trained with."""

TWO_STEPS = {"num_inference_steps": 2}
REQUESTS = {
    "SanaSprintPipeline": TWO_STEPS,
    "SanaSprintImg2ImgPipeline": TWO_STEPS,
    "SanaVideoPipeline": {"width": 64, "height": 96},
    "SanaImageToVideoPipeline": {"width": 64, "height": 96},
}
"""Sprint draws in two steps, unless it is told another schedule."""

TINY: dict[str, Any] = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_attention_heads": 12,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_cross_attention_heads": 6,
    "cross_attention_head_dim": 24,
    "cross_attention_dim": 144,
    "caption_channels": TEXT_WIDTH,
}


def demo_pipeline(name: str = "SanaPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    characters = vocabulary.t5(padding_side="left")  # as Gemma's; the pipelines ask for the other side
    torch.manual_seed(0)
    video, sprint = "Video" in name, "Sprint" in name
    more: dict[str, Any] = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"} if sprint else {}
    transformer = (SanaVideoTransformer3DModel if video else SanaTransformer2DModel)(**TINY | more)
    amplify(transformer, TRANSFORMER_GAINS)
    text_encoder = Gemma2Model(
        Gemma2Config(
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=len(characters),
            pad_token_id=0,
        )
    )
    beside = {}
    if "Control" in name:
        beside = {"controlnet": controlnet(diffusers.SanaControlNetModel, transformer, num_layers=1)}
    return getattr(diffusers, name)(
        tokenizer=characters,
        text_encoder=text_encoder.eval(),
        vae=demo_vae(latents_mean=[0.2, -0.1, 0.1, 0.3], latents_std=[1.5, 0.8, 1.2, 2.0]) if video else _vae(),
        transformer=transformer.eval(),
        scheduler=_scheduler(name),
        **beside,
    )


def _scheduler(name: str) -> Any:
    if "Sprint" in name:
        return SCMScheduler()
    if name == "SanaImageToVideoPipeline":
        return FlowMatchEulerDiscreteScheduler(shift=8.0)
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _vae() -> Any:
    """An `AutoencoderDC` that reduces sizes by 8, with its own linear attention."""
    kinds = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    widths, scales = (8, 8, 16, 16), ((), (), (), (5,))
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
    ).eval()
