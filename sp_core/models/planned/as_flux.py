"""What models built like Flux have in common: their plan, and the size and inputs of their examples."""

from typing import Any

from sp_core.models.family import Tokens
from sp_core.sp_plan import (
    SequenceParallelCompanion,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

SP_PLAN: SequenceParallelModelPlan = {
    "": {
        "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        "img_ids": SequenceParallelCompanion(split_dim=-2),
        "txt_ids": SequenceParallelCompanion(split_dim=-2),
    },
    "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
}

TINY: dict[str, Any] = {
    "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 16,
    "axes_dims_rope": [4, 4, 4], "attention_head_dim": 12, "num_attention_heads": 12,
}  # fmt: skip
GAINS = {"norm1.linear": 3, "norm.linear": 3}


def inputs(tokens: Tokens) -> dict[str, Any]:
    image = tokens.height * tokens.width
    return {
        "hidden_states": tokens.normal(tokens.batch, image, 8),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(0.5, tokens.batch),
        "img_ids": tokens.tensor([[3.0 * i, 3.0 * i + 1, 3.0 * i + 2] for i in range(image)]),
        "txt_ids": tokens.full(0.0, tokens.text, 3),
    }
