"""Wan 2.1 and 2.2: video tokens attend to themselves; text is only looked at (cross-attention) and stays whole.

Peculiarities:
- `flatten` and `transpose` stand in the model's forward, so the sequence is first seen by a module at the first block.
- Cross-attention passes no parallel configuration on and stays local: every rank has the whole text.
- Text+image-to-video gives one timestep per token, `(B, S)`. Split at the root like the tokens, everything made from
  it is this rank's own: modulation in the blocks and, in the model's forward, before the last projection. The other
  variants give one per sample, `(B,)`, which the same entry leaves alone.
- Wan 2.2 A14B has two transformers that take turns; parallelise both, each keeps its own record.
"""

from sp_core.models.family import ModelFamily
from sp_core.sp_plan import OptionalSequenceParallelInput, SequenceParallelInput, SequenceParallelOutput

WAN = ModelFamily(
    transformer_classes=("WanTransformer3DModel",),
    sp_plan={
        "": {"timestep": OptionalSequenceParallelInput(split_dim=1, expected_dims=2)},
        "rope": {
            0: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True),
            1: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True),
        },
        "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
)
