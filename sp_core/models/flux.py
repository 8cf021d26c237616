"""Flux: two streams, text and image, side by side at first and then as one.

Peculiarities:
- Both streams and their positions are split on entry, before anything is made from them: rotations, modulation and
  both kinds of block then see only this rank's tokens, and the forward's own `cat` joins shares with shares.
- Attention joins [text, image], so the plan names the text stream first.
- Positions are `(S, 3)`, or `(B, S, 3)` from older callers: hence the dimension counted from behind.
- ControlNet residuals are a list, a tuple or None, as long as the image; there may be fewer of them than blocks.
- The single-stream blocks also have a `proj_out`; the one that is gathered is the model's.
"""

from sp_core.models.family import ModelFamily
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput

FLUX = ModelFamily(
    transformer_classes=("FluxTransformer2DModel",),
    sp_plan={
        "": {
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "txt_ids": SequenceParallelCompanion(split_dim=-2),
            "img_ids": SequenceParallelCompanion(split_dim=-2),
            "controlnet_block_samples": SequenceParallelCompanion(split_dim=1, expected_dims=3),
            "controlnet_single_block_samples": SequenceParallelCompanion(split_dim=1, expected_dims=3),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    refused_processors={
        "FluxIPAdapterAttnProcessor": "it attends to image prompts by the same way as to the sequence",
    },
)
