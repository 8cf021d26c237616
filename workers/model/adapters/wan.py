"""Wan 2.1 and 2.2, text to video: how its pipeline is run, and its demo model."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from transformers import UMT5Config, UMT5EncoderModel

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest
from workers.model.adapters.pipeline_adapter import PipelineAdapter

TRANSFORMER_GAINS = {
    "attn1.to_out": 10,
    "attn2.to_out": 10,
    "attn2.norm_k": 4,  # the prompt is a few tokens of 512, the others are zeros: attention must be sharp to find it
    "text_embedder": 4,
    "scale_shift_table": 4,
    "proj_out": 2,
}


class WanAdapter(PipelineAdapter):
    """Guided with or without a negative prompt. Wan 2.2 has two transformers, each with its own scale."""

    count_input = "num_videos_per_prompt"
    output = "videos"
    rounds_timestep = True

    def guiders(self, request: GenerationRequest) -> dict[str, Any]:
        """One for each transformer."""
        second = request.guidance_scale if request.guidance_scale_2 is None else request.guidance_scale_2
        scales = {"guider": request.guidance_scale, "guider_2": second}
        return {name: self.guider(request, scale) for name, scale in scales.items()}

    def guiders_to_encode(self, request: GenerationRequest) -> dict[str, Any]:
        """Always an enabled guider: the encoder fails without a second branch, even if the loop does not use it."""
        return {"guider": ClassifierFreeGuidance()}

    def inputs(self, request: GenerationRequest) -> dict[str, Any]:
        """The number of frames."""
        return {"negative_prompt": request.negative_prompt, "num_frames": request.num_frames}

    def check(self, pipeline: Any, request: GenerationRequest) -> None:
        """See `PipelineAdapter.check`."""
        super().check(pipeline, request)
        if request.guidance_scale_2 is not None and pipeline.transformer_2 is None:
            raise InvalidParameter(
                "guidance_scale_2", f"{request.model!r} has one transformer; its scale is guidance_scale"
            )

    def check_frames(self, pipeline: Any, request: GenerationRequest) -> None:
        """See `PipelineAdapter.check`."""
        multiple = pipeline.vae_scale_factor_temporal
        if (request.num_frames - 1) % multiple:
            below = (request.num_frames - 1) // multiple * multiple + 1
            raise InvalidParameter(
                "num_frames",
                f"num_frames must be a multiple of {multiple}, plus 1 (such as {below} or {below + multiple}), "
                f"got {request.num_frames}",
            )

    def size_multiple(self, pipeline: Any) -> int:
        """See `PipelineAdapter.size_multiple`."""
        multiple: int = pipeline.vae_scale_factor_spatial * pipeline.patch_size_spatial
        return multiple


ADAPTER = WanAdapter

ROLES = {"WanVACEPipeline": ("video",), "WanImageToVideoPipeline": ("last_image",)}


def demo_pipeline(name: str = "WanPipeline") -> Any:
    """A pipeline of this class, the same weights at every call; of text alone, with two transformers as Wan 2.2."""
    mask = 4  # of the frames that a latent frame is made of
    beside = {"WanImageToVideoPipeline": mask + LATENT_CHANNELS, "LucyEditPipeline": LATENT_CHANNELS}.get(name, 0)
    two = {"transformer_2": None, "boundary_ratio": 0.875} if name == "WanPipeline" else {}
    tokenizer = vocabulary.t5()
    torch.manual_seed(0)
    transformer = _vace_transformer() if name == "WanVACEPipeline" else _transformer(beside)
    two |= {"transformer_2": _transformer()} if two else {}
    vae = demo_vae()
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=16, d_ff=TEXT_WIDTH, num_layers=2, num_heads=4)
    )
    return getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
        **two,
    )


def demo_vae(**options: Any) -> Any:
    """An `AutoencoderKLWan` that reduces sizes by 8 and frames by 4, with 4 latent channels; options change that."""
    settings = {
        "base_dim": 8,
        "z_dim": LATENT_CHANNELS,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * LATENT_CHANNELS,
        "latents_std": [1.0] * LATENT_CHANNELS,
    }
    return AutoencoderKLWan(**settings | options).eval()


TINY = {
    "num_attention_heads": 12,
    "attention_head_dim": 12,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 64,
    "ffn_dim": 192,
    "num_layers": 2,
    "rope_max_seq_len": 512,
}


def _transformer(beside: int = 0) -> Any:
    transformer = WanTransformer3DModel(in_channels=LATENT_CHANNELS + beside, **TINY)
    amplify(transformer, TRANSFORMER_GAINS)
    return transformer.eval()


def _vace_transformer() -> Any:
    """Controlled by a clip, what is drawn anew of it and what is kept, and by the mask between both."""
    mask = 8 * 8  # of the pixels that a latent is made of
    transformer = WanVACETransformer3DModel(
        in_channels=LATENT_CHANNELS, vace_layers=[0, 1], vace_in_channels=2 * LATENT_CHANNELS + mask, **TINY
    )
    amplify(transformer, TRANSFORMER_GAINS)
    return transformer.eval()
