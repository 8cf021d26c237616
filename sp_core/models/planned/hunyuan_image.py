"""HunyuanImage: image and text are two streams in the first blocks, and then one; the text is refined before.

Attention joins [image, text], so the plan names the image first.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.height, tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(500.0, tokens.batch),
    }


HUNYUAN_IMAGE = ModelFamily(
    transformer_classes=("HunyuanImageTransformer2DModel",),
    pipelines=("HunyuanImagePipeline", "HunyuanImageRefinerPipeline"),
    sp_plan={
        "rope": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "transformer_blocks.0": {
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    local_attention=("context_embedder.*",),
    examples={
        "hunyuan-image": Example(
            "HunyuanImageTransformer2DModel",
            {
                "in_channels": 4, "out_channels": 4, "num_attention_heads": 12, "attention_head_dim": 12,
                "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0,
                "patch_size": (1, 1), "text_embed_dim": 16, "rope_axes_dim": (6, 6),
            },
            _inputs,
            {"norm1.linear": 3, "norm.linear": 3},
            mask_input="encoder_attention_mask",
            counts_mask=True,
        ),
    },
)  # fmt: skip
