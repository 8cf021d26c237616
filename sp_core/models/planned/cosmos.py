"""Cosmos 1 and 2: video tokens attend to themselves; text is only attended to and stays whole.

Attention goes to diffusers' dispatch without a configuration, and is captured behind it. A padding mask is a further
channel of the picture, before there are tokens.
"""

from typing import Any

from sp_core.models.family import Config, Example, ModelFamily, Tokens
from sp_core.sp_plan import (
    SequenceParallelCompanion,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.frames, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.full(0.5, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "fps": 30,
        "padding_mask": tokens.full(0.5, 1, 1, 2 * tokens.height, 2 * tokens.width),
    }


def _plan(config: Config) -> SequenceParallelModelPlan:
    """Cosmos 1 learns positions as well, which Cosmos 2 leaves out."""
    learns = config.get("extra_pos_embed_type", "learnable") is not None
    companion = SequenceParallelCompanion(split_dim=1, expected_dims=3, split_output=True)
    return {
        "rope": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        **({"learnable_pos_embed": {0: companion}} if learns else {}),
        "transformer_blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    }


COSMOS = ModelFamily(
    transformer_classes=("CosmosTransformer3DModel",),
    pipelines=("Cosmos2TextToImagePipeline", "CosmosTextToWorldPipeline"),
    sp_plan=_plan,
    local_attention=("*.attn2",),
    captured_processors=("CosmosAttnProcessor2_0",),
    examples={
        name: Example(
            "CosmosTransformer3DModel",
            {
                "in_channels": 4, "out_channels": 4, "num_attention_heads": 12, "attention_head_dim": 16,
                "num_layers": 2, "mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 4,
                "max_size": (4, 32, 32), "extra_pos_embed_type": positions,
            },
            _inputs,
            {"attn1.to_out": 4, "attn1.to_v": 3},
            no_mask="its mask is that of the text, which stays whole",
        )
        for name, positions in (("cosmos", "learnable"), ("cosmos 2", None))
    },
)  # fmt: skip
