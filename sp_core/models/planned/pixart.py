"""PixArt alpha and sigma: image tokens attend to themselves; text is only attended to and stays whole."""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * tokens.height, 2 * tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(500.0, tokens.batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


PIXART = ModelFamily(
    transformer_classes=("PixArtTransformer2DModel",),
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    sp_plan={
        "transformer_blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    local_attention=("*.attn2",),
    captured_processors=("AttnProcessor2_0",),
    examples={
        "pixart": Example(
            "PixArtTransformer2DModel",
            {
                "num_attention_heads": 12, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8,
                "num_layers": 2, "norm_num_groups": 4, "cross_attention_dim": 144, "sample_size": 8, "patch_size": 2,
                "caption_channels": 16, "use_additional_conditions": False,
            },
            _inputs,
            {"attn1.to_out": 4, "scale_shift_table": 4},
            mask_input="encoder_attention_mask",
        ),
    },
)  # fmt: skip
