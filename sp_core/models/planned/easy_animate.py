"""EasyAnimate: text and video are two streams through all blocks. Rotations are of the video's tokens."""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.frames, 2 * tokens.height, 2 * tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(500.0, tokens.batch),
    }


EASY_ANIMATE = ModelFamily(
    transformer_classes=("EasyAnimateTransformer3DModel",),
    pipelines=("EasyAnimatePipeline",),
    refused_pipelines={
        "EasyAnimateControlPipeline": "its own call fails: it gives encode_prompt a text_encoder_index",
        "EasyAnimateInpaintPipeline": "it paints where a clip of masks says, which requests do not bring",
    },
    sp_plan={
        "rope_embedding": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "transformer_blocks.0": {
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    captured_processors=("EasyAnimateAttnProcessor2_0",),
    examples={
        "easy-animate": Example(
            "EasyAnimateTransformer3DModel",
            {
                "num_attention_heads": 12, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
                "patch_size": 2, "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 8, "text_embed_dim": 16,
            },
            _inputs,
            {"norm1.linear": 3, "to_out": 4, "to_v": 3},
        ),
    },
)  # fmt: skip
