"""Latte: blocks attend to the places of a frame and to the frames of a place in turn.

Ranks divide the places. The forward rearranges its tokens by the lengths that it finds, so blocks that attend to frames
see all frames of this rank's places, and their attention is local. Text is only attended to and stays whole.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput

_FRAMES = 3


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, _FRAMES, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.ramp(500.0, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
    }


LATTE = ModelFamily(
    transformer_classes=("LatteTransformer3DModel",),
    pipelines=("LattePipeline",),
    sp_plan={
        "pos_embed": {0: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "temporal_transformer_blocks.*": {
            "timestep": SequenceParallelCompanion(split_dim=0, expected_dims=2, per_sample=True)
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    local_attention=("*.attn2", "temporal_transformer_blocks.*"),
    captured_processors=("AttnProcessor2_0",),
    examples={
        "latte": Example(
            "LatteTransformer3DModel",
            {
                "num_attention_heads": 12, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8,
                "num_layers": 2, "cross_attention_dim": 144, "sample_size": 16, "patch_size": 2,
                "caption_channels": 16, "video_length": _FRAMES, "norm_type": "ada_norm_single",
                "activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False,
            },
            _inputs,
            {"attn1.to_out": 4, "scale_shift_table": 4},
            no_mask="its mask is that of the text, which stays whole",
        ),
    },
)  # fmt: skip
