"""What several demo models share: gains on random weights, a tiny T5 and a tiny image VAE.

Called by the families in `workers.model.adapters`.
"""

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
