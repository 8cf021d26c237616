"""What models built like Wan have in common: their plan, and the size and inputs of their examples."""

from typing import Any

from sp_core.models.family import Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelModelPlan, SequenceParallelOutput

SP_PLAN: SequenceParallelModelPlan = {
    "rope": {
        0: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True),
        1: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True),
    },
    "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
    "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
}

TINY: dict[str, Any] = {
    "num_attention_heads": 12, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}  # fmt: skip
GAINS = {"attn1.to_out": 4, "scale_shift_table": 4}


def inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.frames, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.full(500.0, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
    }
