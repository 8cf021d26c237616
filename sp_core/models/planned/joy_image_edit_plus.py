"""JoyImage-Edit Plus: the patches of all pictures are one stream, the text is another; each sample has its own shapes.

Attention joins [pictures, text]. The forward makes the rotations of each sample from the shapes of its pictures, and
hides the padding of shorter samples.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    rows, columns = tokens.height, tokens.width
    shapes = [
        [(1, 1, columns)] * rows,  # a picture for each row
        [(1, rows, columns - 1)],  # one that is padded
    ]
    return {
        "hidden_states": tokens.normal(tokens.batch, rows * columns, 4, 1, 2, 2),
        "timestep": tokens.full(500.0, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "shape_list": shapes[: tokens.batch],
    }


JOY_IMAGE_EDIT_PLUS = ModelFamily(
    transformer_classes=("JoyImageEditPlusTransformer3DModel",),
    sp_plan={
        "double_blocks.0": {
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "double_blocks.*": {"image_rotary_emb": [SequenceParallelCompanion(split_dim=1, expected_dims=3)] * 2},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    pipelines=("JoyImageEditPlusPipeline",),
    examples={
        "joy-image-edit-plus": Example(
            "JoyImageEditPlusTransformer3DModel",
            {
                "in_channels": 4, "hidden_size": 144, "num_attention_heads": 12, "text_dim": 16,
                "mlp_width_ratio": 2.0, "num_layers": 2, "rope_dim_list": [4, 4, 4],
            },
            _inputs,
            {"attn.": 2},
            mask_input="encoder_hidden_states_mask",
        ),
    },
)  # fmt: skip
