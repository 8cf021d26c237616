"""Lumina Next: image tokens attend to themselves, their scores scaled by the logarithm of how many there are; text is
only attended to and stays whole. The pipeline makes the rotations.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    angles = tokens.normal(tokens.height, tokens.width, 6, seed=3)
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.full(0.5, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "encoder_mask": tokens.full(1.0, tokens.batch, tokens.text),
        "image_rotary_emb": (1j * angles).exp(),
        "cross_attention_kwargs": {},
    }


def _proportional_inputs(tokens: Tokens) -> dict[str, Any]:
    """The scale of the pipeline, which knows for how many tokens the model was trained."""
    return _inputs(tokens) | {"cross_attention_kwargs": {"base_sequence_length": 4}}


_TINY = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 144, "num_layers": 2,
    "num_attention_heads": 12, "num_kv_heads": 12, "multiple_of": 16, "cross_attention_dim": 16,
}  # fmt: skip
_GAINS = {"attn1.to_v": 4, "attn2.to_out": 4, "attn1.to_q": 2}
_NO_MASK = "its masks are those of the text, which stays whole"

LUMINA_NEXT = ModelFamily(
    transformer_classes=("LuminaNextDiT2DModel",),
    pipelines=("LuminaPipeline",),
    sp_plan={
        "patch_embedder": {
            0: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True),
            1: SequenceParallelInput(split_dim=1, expected_dims=2, split_output=True),
            3: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True),
        },
        "norm_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    local_attention=("*.attn2",),
    scales_by_length={"*.attn1": "base_sequence_length"},
    captured_processors=("LuminaAttnProcessor2_0",),
    examples={
        "lumina-next": Example("LuminaNextDiT2DModel", _TINY, _inputs, _GAINS, no_mask=_NO_MASK),
        "lumina-next proportional": Example(
            "LuminaNextDiT2DModel", _TINY, _proportional_inputs, _GAINS, no_mask=_NO_MASK
        ),
    },
)
