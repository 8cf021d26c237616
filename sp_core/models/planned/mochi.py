"""Mochi: video and text are two streams through all blocks; the text's hidden tokens take no part in attention.

Attention joins [video, text].
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.frames, 2 * tokens.height, 2 * tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(500.0, tokens.batch),
    }


MOCHI = ModelFamily(
    transformer_classes=("MochiTransformer3DModel",),
    pipelines=("MochiPipeline",),
    sp_plan={
        "rope": {
            0: SequenceParallelCompanion(split_dim=0, expected_dims=3, split_output=True),
            1: SequenceParallelCompanion(split_dim=0, expected_dims=3, split_output=True),
        },
        "transformer_blocks.0": {
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "transformer_blocks.*": {"encoder_attention_mask": SequenceParallelInput(split_dim=1, expected_dims=2)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    drops_hidden={"*.attn1": "encoder_attention_mask"},
    captured_processors=("MochiAttnProcessor2_0",),
    examples={
        "mochi": Example(
            "MochiTransformer3DModel",
            {
                "num_attention_heads": 12, "attention_head_dim": 12, "num_layers": 3, "pooled_projection_dim": 24,
                "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 16,
            },
            _inputs,
            {"attn1.to_out": 2, "attn1.to_v": 3},
            mask_input="encoder_attention_mask",
            counts_mask=True,
        ),
    },
)  # fmt: skip
