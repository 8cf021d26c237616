"""Flux: two streams, text and image, side by side at first and then as one.

Peculiarities:
- Both streams and their positions are split on entry, before anything is made from them: rotations, modulation and
  both kinds of block then see only this rank's tokens, and the forward's own `cat` joins shares with shares.
- Attention joins [text, image], so the plan names the text stream first.
- The single-stream blocks also have a `proj_out`; the one that is gathered is the model's.
"""

from sp_core.models.family import ModelFamily
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput

FLUX = ModelFamily(
    transformer_classes=("FluxTransformer2DModel",),
    sp_plan={
        "": {
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "txt_ids": SequenceParallelInput(split_dim=0, expected_dims=2),
            "img_ids": SequenceParallelInput(split_dim=0, expected_dims=2),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
)
