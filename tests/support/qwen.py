"""A tiny Qwen-Image transformer and inputs for it, in which attention matters (random, seeded)."""

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel


def transformer(heads: int = 12, layers: int = 2, seed: int = 0) -> QwenImageTransformer2DModel:
    """Weights scaled so that an attention kept local misses the same-answer bar by far."""
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5 + 1.5)
            elif "_mod." in name:
                parameter.mul_(4)
    return model


def inputs(
    height: int, width: int, text: int, batch: int = 1, mask: list[list[bool]] | None = None, seed: int = 1
) -> dict[str, Any]:
    """Keyword arguments of one forward: `height` x `width` image tokens, `text` prompt tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, height * width, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=generator),
        "encoder_hidden_states_mask": None if mask is None else torch.tensor(mask),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, height, width)]] * batch,
    }
