"""The demo model of JoyImage-Edit Plus: the parts of JoyImage-Edit with a transformer that takes several pictures."""

from typing import Any

import torch
from diffusers import JoyImageEditPlusPipeline, JoyImageEditPlusTransformer3DModel

from workers.demo_models.classic import joy_image_edit
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify

REQUEST = {"n": 1}
"""From text alone its call makes as many pictures as there are prompts."""


def demo_pipeline() -> Any:
    """A `JoyImageEditPlusPipeline`, the same weights at every call."""
    parts = joy_image_edit.demo_pipeline().components
    torch.manual_seed(0)
    transformer = JoyImageEditPlusTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        hidden_size=12 * 12,
        num_attention_heads=12,
        text_dim=TEXT_WIDTH,
        mlp_width_ratio=2.0,
        num_layers=2,
        rope_dim_list=[4, 4, 4],
    )
    amplify(transformer, joy_image_edit.TRANSFORMER_GAINS)
    return JoyImageEditPlusPipeline(**(parts | {"transformer": transformer.eval()}))
