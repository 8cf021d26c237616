"""Flux 2, Klein included: text and image, first in blocks that join them, then in blocks that take them as one.

Peculiarities:
- Both streams and their positions are split on entry: the forward reads the text's length off the tensor it gets and
  slices its own join with it, so a share's length is right.
- Attention joins [text, image], so the plan names the text stream first. There is no text mask.
- Positions `(B, S, 4)` may be floating and would then look like a stream: companions.
- Reference images are additional image tokens with other positions; the plan is the same.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput

_CACHED = "its cache of reference tokens counts tokens of the whole sequence"


def _inputs(tokens: Tokens) -> dict[str, Any]:
    """Floating positions, which look like a stream."""
    width, image = tokens.width, tokens.height * tokens.width
    positions = [[0.0, i // width, i % width, 0.0] for i in range(image)]
    return {
        "hidden_states": tokens.normal(tokens.batch, image, 8),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(0.5, tokens.batch),
        "guidance": tokens.full(4.0, tokens.batch),
        "img_ids": tokens.tensor([positions] * tokens.batch),
        "txt_ids": tokens.tensor([[[0.0, 0.0, 0.0, float(i)] for i in range(tokens.text)]] * tokens.batch),
    }


_TINY = {
    "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 12,
    "joint_attention_dim": 16, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip

FLUX_2 = ModelFamily(
    transformer_classes=("Flux2Transformer2DModel",),
    pipelines=("Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2Pipeline"),
    refused_pipelines={"Flux2KleinKVPipeline": _CACHED},
    sp_plan={
        "": {
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "txt_ids": SequenceParallelCompanion(split_dim=-2),
            "img_ids": SequenceParallelCompanion(split_dim=-2),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    refused_processors={"Flux2KVAttnProcessor": _CACHED, "Flux2KVParallelSelfAttnProcessor": _CACHED},
    examples={"flux-2": Example("Flux2Transformer2DModel", _TINY, _inputs, {"modulation": 4})},
)
