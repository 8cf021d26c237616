"""HunyuanVideo: two streams, video and text, side by side at first and then as one.

Peculiarities:
- The split stands at the first block, not at the embedders: the forward reads the whole video length behind them, to
  make its mask, and the text refiner averages over the whole text.
- Attention joins [video, text], so the plan names the video stream first. The mask `(B, 1, 1, S)` spans all keys in
  that order; it stays out of the plan, and attention picks each rank's part.
- The refiner's attention runs in front of the region, on whole text, and stays local.
- Image to video by token replacement: the first frame's tokens are modulated on their own, as "the first n tokens";
  each rank needs its part of that count. Only the blocks of that variant have the parameter.
"""

from collections.abc import Mapping
from typing import Any

from sp_core.models.family import ModelFamily
from sp_core.sp_plan import (
    SequenceParallelInput,
    SequenceParallelLeadingCount,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)


def _plan(config: Mapping[str, Any]) -> SequenceParallelModelPlan:
    plan: SequenceParallelModelPlan = {
        "rope": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "transformer_blocks.0": {
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    }
    if config.get("image_condition_type") == "token_replace":
        for blocks in ("transformer_blocks.*", "single_transformer_blocks.*"):
            plan[blocks] = {"num_tokens": SequenceParallelLeadingCount("hidden_states")}
    return plan


HUNYUAN_VIDEO = ModelFamily(
    transformer_classes=("HunyuanVideoTransformer3DModel",),
    sp_plan=_plan,
    local_attention=("context_embedder.*",),
)
