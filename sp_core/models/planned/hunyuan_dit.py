"""HunyuanDiT: image tokens attend to themselves; text is only attended to and stays whole. Later blocks take the
outputs of earlier ones, which are divided like the image; so are the residuals of a ControlNet. The pipeline makes the
rotations.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    count = tokens.height * tokens.width
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.full(500.0, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, 5, 16, seed=2),
        "text_embedding_mask": tokens.full(1.0, tokens.batch, 5),
        "encoder_hidden_states_t5": tokens.normal(tokens.batch, 6, 24, seed=3),
        "text_embedding_mask_t5": tokens.full(1.0, tokens.batch, 6),
        "image_rotary_emb": (tokens.normal(count, 12, seed=5), tokens.normal(count, 12, seed=6)),
    }


def _control_inputs(tokens: Tokens) -> dict[str, Any]:
    """A residual for the one skip connection of four blocks."""
    residual = tokens.normal(tokens.batch, tokens.height * tokens.width, 144, seed=7)
    return _inputs(tokens) | {"controlnet_block_samples": [residual]}


_TINY = {
    "num_attention_heads": 12, "attention_head_dim": 12, "in_channels": 4, "patch_size": 2, "sample_size": 16,
    "hidden_size": 144, "num_layers": 4, "mlp_ratio": 2.0, "cross_attention_dim": 16, "cross_attention_dim_t5": 24,
    "pooled_projection_dim": 16, "text_len": 5, "text_len_t5": 6, "use_style_cond_and_image_meta_size": False,
}  # fmt: skip
_GAINS = {"attn1.to_out": 4, "attn1.to_v": 3}
_NO_MASK = "its masks are those of the text, which stays whole"

HUNYUAN_DIT = ModelFamily(
    transformer_classes=("HunyuanDiT2DModel",),
    pipelines=("HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline"),
    sp_plan={
        "": {
            "image_rotary_emb": SequenceParallelCompanion(split_dim=0, expected_dims=2),
            "controlnet_block_samples": SequenceParallelCompanion(split_dim=1, expected_dims=3),
        },
        "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    local_attention=("*.attn2",),
    captured_processors=("HunyuanAttnProcessor2_0",),
    examples={
        "hunyuan-dit": Example("HunyuanDiT2DModel", _TINY, _inputs, _GAINS, no_mask=_NO_MASK),
        "hunyuan-dit control": Example("HunyuanDiT2DModel", _TINY, _control_inputs, _GAINS, no_mask=_NO_MASK),
    },
)
