"""The demo models of Flux 2 and Flux 2 Klein, which take any number of pictures beside the prompt."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from transformers import Qwen3Config, Qwen3ForCausalLM

from workers.demo_models import vocabulary
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify
from workers.demo_models.vision_language import PIXTRAL_TOKENS, mistral3_encoder, pixtral_processor

TRANSFORMER_GAINS = {"modulation": 4, "add_k_proj": 3, "add_v_proj": 10, "to_out": 4, "proj_out": 2}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
)
CHAT_TEMPLATE_OF_PARTS = CHAT_TEMPLATE.replace("message.content", "message.content[0].text")
"""For messages that are lists, of text and pictures; the pipeline asks for text alone."""

LAYERS_READ = (9, 18, 27)
"""Of Klein's text encoder, as the pipeline has them; their outputs lie side by side."""

LAST_READ = 30
"""Of the three layers that Flux 2 reads."""


def demo_pipeline(name: str = "Flux2KleinPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    klein = name != "Flux2Pipeline"
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=12,
        joint_attention_dim=len(LAYERS_READ) * TEXT_WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    amplify(transformer, TRANSFORMER_GAINS)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=4
    )
    vae.bn.running_mean.copy_(torch.linspace(-0.2, 0.2, 4 * LATENT_CHANNELS))
    text_encoder, tokenizer = _klein_reader() if klein else _reader()
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def _klein_reader() -> tuple[Any, Any]:
    """A text encoder and its tokenizer."""
    tokenizer = vocabulary.qwen2(chat_template=CHAT_TEMPLATE)
    config = Qwen3Config(
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=LAYERS_READ[-1],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
    )
    return Qwen3ForCausalLM(config), tokenizer


def _reader() -> tuple[Any, Any]:
    """A text encoder, and the processor that stands in the tokenizer's place."""
    tokenizer = vocabulary.qwen2(SYSTEM_MESSAGE, PIXTRAL_TOKENS)
    return mistral3_encoder(tokenizer, LAST_READ), pixtral_processor(tokenizer, CHAT_TEMPLATE_OF_PARTS)
