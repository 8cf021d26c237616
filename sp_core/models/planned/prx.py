"""PRX: image tokens attend to themselves and to the text, whose keys stand in front; text is whole on every rank."""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.full(0.5, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
    }


def _of_pixels(tokens: Tokens) -> dict[str, Any]:
    return _inputs(tokens) | {"hidden_states": tokens.normal(tokens.batch, 3, 2 * tokens.height, 2 * tokens.width)}


PRX = ModelFamily(
    transformer_classes=("PRXTransformer2DModel",),
    pipelines=("PRXPipeline", "PRXPixelPipeline"),
    sp_plan={
        "pe_embedder": {0: SequenceParallelCompanion(split_dim=2, expected_dims=6, split_output=True)},
        "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "final_layer": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    keys_in_front=("*.attention",),
    examples={
        "prx": Example(
            "PRXTransformer2DModel",
            {
                "in_channels": 4, "patch_size": 2, "context_in_dim": 16, "hidden_size": 144, "mlp_ratio": 2.0,
                "num_heads": 12, "depth": 2, "axes_dim": [6, 6],
            },
            _inputs,
            {"attention.": 2},
            mask_input="attention_mask",
        ),
        "prx pixel": Example(
            "PRXTransformer2DModel",
            {
                "in_channels": 3, "patch_size": 2, "context_in_dim": 16, "hidden_size": 144, "mlp_ratio": 2.0,
                "num_heads": 12, "depth": 2, "axes_dim": [6, 6], "bottleneck_size": 8, "resolution_embeds": True,
            },
            _of_pixels,
            {"attention.": 2},
            mask_input="attention_mask",
        ),
    },
)  # fmt: skip
