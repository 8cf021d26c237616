"""CogView 3 Plus and 4: text and image are two streams through all blocks. CogView 4 rotates the image's tokens."""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelModelPlan, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * tokens.height, 2 * tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(500.0, tokens.batch),
        "original_size": tokens.full(64.0, tokens.batch, 2),
        "target_size": tokens.full(64.0, tokens.batch, 2),
        "crop_coords": tokens.full(0.0, tokens.batch, 2),
    }


_PLAN: SequenceParallelModelPlan = {
    "transformer_blocks.0": {
        "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
    },
    "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
}
_TINY: dict[str, Any] = {
    "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 12,
    "out_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 16,
    "sample_size": 8,
}  # fmt: skip

COG_VIEW_3_PLUS = ModelFamily(
    transformer_classes=("CogView3PlusTransformer2DModel",),
    pipelines=("CogView3PlusPipeline",),
    sp_plan=_PLAN,
    captured_processors=("CogVideoXAttnProcessor2_0",),
    examples={"cog-view 3": Example("CogView3PlusTransformer2DModel", _TINY, _inputs)},
)

COG_VIEW_4 = ModelFamily(
    transformer_classes=("CogView4Transformer2DModel",),
    pipelines=("CogView4Pipeline", "CogView4ControlPipeline"),
    sp_plan={
        "rope": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        **_PLAN,
    },
    captured_processors=("CogView4AttnProcessor",),
    examples={
        "cog-view 4": Example("CogView4Transformer2DModel", _TINY | {"rope_axes_dim": (16, 16)}, _inputs),
    },
)
