"""What several demo models share: gains on random weights, tiny encoders, a tiny image VAE and tiny ControlNets.

Called by the families in `workers.model.adapters`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

LATENT_CHANNELS = 4
TEXT_WIDTH = 64


def amplify(model: nn.Module, gains: Mapping[str, float]) -> None:
    """Multiply the parameters by the gains, which are keyed by a part of the parameter's name.

    With diffusers' own initialization a tiny model is nearly blind: the residual branches add little to what passes
    them by, so that it would draw the same without any attention, whatever the prompt.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part, gain in gains.items():
                if part in name:
                    parameter.mul_(gain)


def t5_encoder(tokens: int) -> Any:
    """A `T5EncoderModel` of two layers, for a vocabulary of so many tokens."""
    from transformers import T5Config, T5EncoderModel  # here: ranks load this file, and few of their models read by T5

    config = T5Config(vocab_size=tokens, d_model=TEXT_WIDTH, d_kv=16, d_ff=TEXT_WIDTH, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def image_vae(latent_channels: int = LATENT_CHANNELS) -> Any:
    """An `AutoencoderKL` that reduces sizes by 8, as Z-Image's and Flux's does."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def controlnet(kind: Any, transformer: Any, **init: Any) -> Any:
    """A ControlNet, the same weights at every call.

    Args:
        kind: its class.
        transformer: beside which it stands; settings that both have are the transformer's.
        init: its other settings, and those that differ.
    """
    shared = {
        name: transformer.config[name] for name in inspect.signature(kind).parameters if name in transformer.config
    }
    torch.manual_seed(1)
    made = kind(**shared | init)
    for parameter in made.parameters():
        if not parameter.any():  # it begins with layers of zeros, which would hide what happens to its residuals
            nn.init.normal_(parameter, std=0.1)
    return made.eval()


def umt5_encoder(tokens: int) -> Any:
    """A `UMT5EncoderModel` of two layers, for a vocabulary of so many tokens."""
    from transformers import UMT5Config, UMT5EncoderModel  # here: few families need it

    config = UMT5Config(vocab_size=tokens, d_model=TEXT_WIDTH, d_kv=16, d_ff=TEXT_WIDTH, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config).eval()


def qwen_vl_encoder(tokenizer: Any, layers: int = 2) -> Any:
    """A `Qwen2_5_VLForConditionalGeneration` of a few layers, for `vocabulary.qwen2`."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # here: few families need it

    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            vision_start_token_id=token_id("<|vision_start|>"),
            vision_end_token_id=token_id("<|vision_end|>"),
            vision_token_id=token_id("<|vision_pad|>"),
            image_token_id=token_id("<|image_pad|>"),
            video_token_id=token_id("<|video_pad|>"),
        )
    ).eval()


def qwen3_encoder(tokens: int) -> Any:
    """A `Qwen3Model` of two layers, for a vocabulary of so many tokens."""
    from transformers import Qwen3Config, Qwen3Model  # here: few families need it

    config = Qwen3Config(
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=tokens,
        max_position_embeddings=2048,
    )
    return Qwen3Model(config).eval()
