"""Z-Image: how its pipeline is run, and its demo model."""

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers.guiders import ClassifierFreeGuidance
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, controlnet, image_vae
from workers.messages import GenerationRequest
from workers.model.adapters.pipeline_adapter import PipelineAdapter

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRANSFORMER_GAINS = {"adaLN": 2, "attention_norm2": 3, "attention.norm_k": 2, "final_layer.2-1.linear": 2}


class ZImageAdapter(PipelineAdapter):
    """Guided above a scale of 0, with or without a negative prompt: prompt + scale x (prompt - negative)."""

    rounds_timestep = True

    def guiders(self, request: GenerationRequest) -> dict[str, Any]:
        """The formula of the classic pipeline."""
        return {"guider": ClassifierFreeGuidance(guidance_scale=request.guidance_scale, use_original_formulation=True)}


ADAPTER = ZImageAdapter


def demo_pipeline(name: str = "ZImagePipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    tokenizer = vocabulary.qwen2(chat_template=CHAT_TEMPLATE)
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=144,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=12,
        n_kv_heads=12,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 4, 4],
        axes_lens=[1024, 512, 512],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(token)  # they are zero until trained, which would hide mistakes in the padding
    amplify(transformer, TRANSFORMER_GAINS)
    vae = image_vae()
    text_encoder = Qwen3Model(
        Qwen3Config(
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=len(tokenizer),
            max_position_embeddings=2048,
        )
    )
    beside = {"controlnet": _controlnet(transformer, "Inpaint" in name)} if "Control" in name else {}
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        **beside,
    )


def _controlnet(transformer: Any, masked: bool) -> Any:
    """One that borrows the transformer's embeddings and refiners.

    Args:
        transformer: the demo model's.
        masked: it takes a mask and a picture beside the one of control, and refines them together with the noise, as
            the second version does.
    """
    channels = transformer.config.in_channels
    return controlnet(
        diffusers.ZImageControlNetModel,
        transformer,
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=2 * channels + 1 if masked else channels,
        add_control_noise_refiner="control_noise_refiner" if masked else None,
    )
