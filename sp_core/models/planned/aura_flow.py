"""AuraFlow: text and image are two streams in the first blocks, and then one; registers stand before the text.

Its positions are learned and added to the image before the blocks, so they are never split.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * tokens.height, 2 * tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(0.5, tokens.batch),
    }


AURA_FLOW = ModelFamily(
    transformer_classes=("AuraFlowTransformer2DModel",),
    pipelines=("AuraFlowPipeline",),
    sp_plan={
        "joint_transformer_blocks.0": {
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    captured_processors=("AuraFlowAttnProcessor2_0",),
    examples={
        "aura-flow": Example(
            "AuraFlowTransformer2DModel",
            {
                "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
                "attention_head_dim": 12, "num_attention_heads": 12, "joint_attention_dim": 16,
                "caption_projection_dim": 144, "out_channels": 4, "pos_embed_max_size": 144,
            },
            _inputs,
            {"norm1.linear": 3, "norm1_context.linear": 3, "attn.to_out": 4, "attn.to_add_out": 4},
        ),
    },
)  # fmt: skip
