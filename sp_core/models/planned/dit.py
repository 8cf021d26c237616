"""DiT: image tokens attend to themselves; a class of ImageNet modulates them. Images are square."""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    side = {3: 6, 1: 1}.get(tokens.height, tokens.height)
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * side, 2 * side),
        "timestep": tokens.full(500.0, tokens.batch).long(),
        "class_labels": tokens.full(1.0, tokens.batch).long(),
    }


DIT = ModelFamily(
    transformer_classes=("DiTTransformer2DModel",),
    sp_plan={
        "transformer_blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "proj_out_2": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    captured_processors=("AttnProcessor2_0",),
    examples={
        "dit": Example(
            "DiTTransformer2DModel",
            {
                "num_attention_heads": 12, "attention_head_dim": 12, "in_channels": 4, "num_layers": 2,
                "sample_size": 12, "norm_num_groups": 4,
            },
            _inputs,
            {"norm1.linear": 3, "to_out": 4, "to_v": 3},
            no_length={"short": "its one token attends to itself alone"},
        ),
    },
)  # fmt: skip
