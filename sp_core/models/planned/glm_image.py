"""GLM-Image: text and image are two streams through all blocks; tokens of a language model are added to the image."""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    image = tokens.height * tokens.width
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * tokens.height, 2 * tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "prior_token_id": tokens.tensor([[at % 16 for at in range(image)]] * tokens.batch),
        "prior_token_drop": tokens.tensor([[False] * image] * tokens.batch),
        "timestep": tokens.full(500.0, tokens.batch),
        "target_size": tokens.full(64.0, tokens.batch, 2),
        "crop_coords": tokens.full(0.0, tokens.batch, 2),
    }


GLM_IMAGE = ModelFamily(
    transformer_classes=("GlmImageTransformer2DModel",),
    pipelines=("GlmImagePipeline",),
    sp_plan={
        "rope": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "transformer_blocks.0": {
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    examples={
        "glm-image": Example(
            "GlmImageTransformer2DModel",
            {
                "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
                "num_attention_heads": 12, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4,
                "prior_vq_quantizer_codebook_size": 16,
            },
            _inputs,
            {"norm1.linear": 3, "to_out": 4, "to_v": 3},
            no_mask="its processors make a mask of queries and keys, which a plan cannot split",
        ),
    },
)  # fmt: skip
