"""AnyFlow: like Wan, with a modulation for each token. The forward also uses the embedded timestep after the blocks, so
both are split where they are made.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, tokens.frames, 4, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.full(500.0, tokens.batch, tokens.frames),
        "r_timestep": tokens.full(250.0, tokens.batch, tokens.frames),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
    }


ANY_FLOW = ModelFamily(
    transformer_classes=("AnyFlowTransformer3DModel",),
    pipelines=("AnyFlowPipeline",),
    sp_plan={
        "rope": {
            0: SequenceParallelInput(split_dim=2, expected_dims=4, split_output=True),
            1: SequenceParallelInput(split_dim=2, expected_dims=4, split_output=True),
        },
        "condition_embedder": {
            0: SequenceParallelCompanion(split_dim=1, expected_dims=3, split_output=True),
            1: SequenceParallelCompanion(split_dim=1, expected_dims=3, split_output=True),
        },
        "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    local_attention=("*.attn2",),
    examples={
        "any-flow": Example(
            "AnyFlowTransformer3DModel",
            {
                "num_attention_heads": 12, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
                "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 32,
            },
            _inputs,
            {"attn1.to_out": 4, "scale_shift_table": 4},
        ),
    },
)  # fmt: skip
