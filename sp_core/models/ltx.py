"""LTX-Video: video tokens attend to themselves; text is only looked at (cross-attention) and stays whole.

Peculiarities:
- The pipeline packs the latents, so the tokens exist when the transformer is entered.
- Cross-attention (`attn2`) passes the parallel configuration on like self-attention, and must be kept local by name: by
  lengths the two cannot be told apart, since a rank's share may be as long as the text. diffusers' own plan splits the
  text instead, and fails on the mask that its pipeline always passes.
- The rotations are `(B, S, D)`, which looks like a stream: companions.
- The timestep comes as `(B,)`, `(B, 1)`, `(B, S)` or `(B, S, 1)`: split where it has one value per token.
"""

from sp_core.models.family import ModelFamily
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput
from sp_core.tp_plan import AcrossHeads, Channels, Colwise, Heads, Rowwise

LTX = ModelFamily(
    transformer_classes=("LTXVideoTransformer3DModel",),
    sp_plan={
        "": {
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "timestep": SequenceParallelCompanion(split_dim=1, optional=True),
        },
        "rope": {
            0: SequenceParallelCompanion(split_dim=1, expected_dims=3, split_output=True),
            1: SequenceParallelCompanion(split_dim=1, expected_dims=3, split_output=True),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    tp_plan={
        "rope": Channels(),  # features of all heads
        "*.attn[12]": Heads(),
        "*.attn[12].to_[qkv]": Colwise(),
        "*.attn[12].norm_[qk]": AcrossHeads(),
        "*.attn[12].to_out.0": Rowwise(),
        "*.ff.net.0.proj": Colwise(),
        "*.ff.net.2": Rowwise(),
    },
    local_attention=("*.attn2",),
)
