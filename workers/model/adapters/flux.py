"""Flux.1: how its pipeline is run, and its demo model."""

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, controlnet, image_vae
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest
from workers.model.adapters.pipeline_adapter import PipelineAdapter

TRANSFORMER_GAINS = {"norm1.linear": 3, "norm.linear": 3, "add_k_proj": 3, "add_v_proj": 10, "to_out": 4, "proj_out": 3}


class FluxAdapter(PipelineAdapter):
    """Guidance is distilled into the transformer, which takes the scale as an input: there is no second branch."""

    def guiders(self, request: GenerationRequest) -> dict[str, Any]:
        """None."""
        return {}

    def inputs(self, request: GenerationRequest) -> dict[str, Any]:
        """The scale."""
        return {"guidance_scale": request.guidance_scale}

    def pack(self, pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
        """See `PipelineAdapter.pack`."""
        tokens: torch.Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
        return tokens

    def check(self, pipeline: Any, request: GenerationRequest) -> None:
        """See `PipelineAdapter.check`."""
        super().check(pipeline, request)
        if request.negative_prompt:
            raise InvalidParameter("negative_prompt", "this model is not guided by a negative prompt; leave it out")


ADAPTER = FluxAdapter


CONDITIONED = {"Fill": LATENT_CHANNELS + 64, "ControlNet": 0, "Control": LATENT_CHANNELS}
"""Channels that a cell has beside the noise, by what is in the name of a pipeline: a picture, and a mask in pixels."""


def demo_pipeline(name: str = "FluxPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    beside = next((channels for part, channels in CONDITIONED.items() if part in name), 0)
    words, characters = vocabulary.clip(), vocabulary.t5()
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4 * (LATENT_CHANNELS + beside),
        out_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=12,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = image_vae()
    pooled = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        )
    )
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(characters), d_model=TEXT_WIDTH, d_kv=16, d_ff=TEXT_WIDTH, num_layers=2, num_heads=4)
    )
    beside_it = {"controlnet": _controlnet(transformer, "Img2Img" in name)} if "ControlNet" in name else {}
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=pooled.eval(),
        tokenizer=words,
        text_encoder_2=text_encoder.eval(),
        tokenizer_2=characters,
        transformer=transformer.eval(),
        **beside_it,
    )


def _controlnet(transformer: Any, several: bool) -> Any:
    """A small one; `several`: it has three kinds of control, and must be told one."""
    kinds = 3 if several else None
    return controlnet(diffusers.FluxControlNetModel, transformer, num_layers=1, num_single_layers=1, num_mode=kinds)
