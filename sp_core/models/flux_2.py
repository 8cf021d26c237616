"""Flux 2, Klein included: text and image, in blocks that join them and then in blocks that take them as one.

Peculiarities:
- Both streams and their positions are split on entry: the forward takes the text's length from the tensor it is given
  and uses it to slice what it has joined itself, so a share's length is the right one.
- Attention joins [text, image], so the plan names the text stream first. There is no text mask.
- Positions `(B, S, 4)` may be floating and would then look like a stream: companions.
- Reference images are more image tokens with other positions; nothing changes.
"""

from sp_core.models.family import ModelFamily
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput

_CACHED = "its cache of reference tokens counts tokens of the whole sequence"

FLUX_2 = ModelFamily(
    transformer_classes=("Flux2Transformer2DModel",),
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
)
