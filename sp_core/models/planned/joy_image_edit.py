"""JoyImage-Edit: images and text are two streams through all blocks; the forward makes the rotations of the images.

Attention joins [images, text].
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.frames, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.full(500.0, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
    }


JOY_IMAGE_EDIT = ModelFamily(
    transformer_classes=("JoyImageEditTransformer3DModel",),
    sp_plan={
        "double_blocks.0": {
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "double_blocks.*": {"image_rotary_emb": [SequenceParallelCompanion(split_dim=0, expected_dims=2), None]},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    pipelines=("JoyImageEditPipeline",),
    examples={
        "joy-image-edit": Example(
            "JoyImageEditTransformer3DModel",
            {
                "in_channels": 4, "hidden_size": 144, "num_attention_heads": 12, "text_dim": 16,
                "mlp_width_ratio": 2.0, "num_layers": 2, "rope_dim_list": [4, 4, 4],
            },
            _inputs,
            {"attn.": 2},
        ),
    },
)  # fmt: skip
