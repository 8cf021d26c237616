"""CogVideoX: text and video are two streams through all blocks. The pipeline makes the rotations of the video."""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import (
    SequenceParallelCompanion,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)


def inputs(tokens: Tokens) -> dict[str, Any]:
    count = tokens.frames * tokens.height * tokens.width
    return {
        "hidden_states": tokens.normal(tokens.batch, tokens.frames, 4, 2 * tokens.height, 2 * tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(500.0, tokens.batch),
        "image_rotary_emb": (tokens.normal(count, 12, seed=5), tokens.normal(count, 12, seed=6)),
    }


SP_PLAN: SequenceParallelModelPlan = {
    "": {"image_rotary_emb": SequenceParallelCompanion(split_dim=0, expected_dims=2)},
    "transformer_blocks.0": {
        "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
    },
    "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
}
TINY = {
    "num_attention_heads": 12, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 16, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 9, "patch_size": 2,
    "temporal_compression_ratio": 4, "max_text_seq_length": 8, "use_rotary_positional_embeddings": True,
}  # fmt: skip

COG_VIDEO_X = ModelFamily(
    transformer_classes=("CogVideoXTransformer3DModel",),
    pipelines=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
    sp_plan=SP_PLAN,
    captured_processors=("CogVideoXAttnProcessor2_0",),
    examples={"cog-video-x": Example("CogVideoXTransformer3DModel", TINY, inputs)},
)
