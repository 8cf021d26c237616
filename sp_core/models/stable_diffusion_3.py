"""Stable Diffusion 3 and 3.5: two streams, image and text; 3.5 medium has blocks that also attend to the image alone.

Peculiarities:
- Its processor calls torch's attention itself, without diffusers' dispatch: its calls are captured.
- Attention joins [image, text], so the plan names the image stream first. `attn2` sees the image alone.
- `attn` and `attn2` of a block share one processor object; they are told apart by module.
- ControlNet residuals are a list, a tuple or None, as long as the image.
- The last block returns no text.
"""

from sp_core.models.family import ModelFamily
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput

STABLE_DIFFUSION_3 = ModelFamily(
    transformer_classes=("SD3Transformer2DModel",),
    sp_plan={
        "": {"block_controlnet_hidden_states": SequenceParallelCompanion(split_dim=1, expected_dims=3)},
        "transformer_blocks.0": {
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    own_stream={"*.attn2": "hidden_states"},
    captured_processors=("JointAttnProcessor2_0",),
)
