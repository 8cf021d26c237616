"""A tiny CLIP and a tiny SigLIP, which look at pictures, for the demo models of pipelines that begin with one."""

from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

WIDTH = 32
"""Features of a patch."""

EDGE = 32
"""Pixels of a picture, as it is looked at."""


def image_encoder() -> Any:
    """A `CLIPVisionModel` of three layers: pipelines take the last but one."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=EDGE,
        patch_size=8,
    )
    return CLIPVisionModel(config).eval()


def image_processor() -> Any:
    """What cuts pictures for it."""
    return CLIPImageProcessor(size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE})


def siglip_encoder() -> Any:
    """A `SiglipVisionModel` of two layers."""
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=EDGE,
        patch_size=8,
    )
    return SiglipVisionModel(config).eval()


def siglip_processor() -> Any:
    """What cuts pictures for it."""
    return SiglipImageProcessor(size={"height": EDGE, "width": EDGE})
