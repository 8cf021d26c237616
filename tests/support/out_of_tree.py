"""Transformers and plans that are neither diffusers' nor spray's own, as a user's package would have them."""

import functools
import time
from typing import Any, ClassVar

import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel

from sp_core.sp_plan import SequenceParallelInput, SequenceParallelModelPlan, SequenceParallelOutput

TOKENS = SequenceParallelInput(split_dim=1, expected_dims=3)
ROTATIONS = SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True)

PLAN: SequenceParallelModelPlan = {
    "pos_embed": {0: ROTATIONS, 1: ROTATIONS},
    "transformer_blocks.0": {"encoder_hidden_states": TOKENS, "hidden_states": TOKENS},
    "transformer_blocks.*": {"encoder_hidden_states_mask": SequenceParallelInput(split_dim=1, expected_dims=2)},
    "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
}

NO_PLAN = {"pos_embed": "split"}


class Planned(QwenImageTransformer2DModel):  # type: ignore[misc]
    """Its plan is its own."""

    _sp_plan = PLAN


class Misplanned(QwenImageTransformer2DModel):  # type: ignore[misc]
    """Its own plan does not fit it."""

    _sp_plan: ClassVar[dict[str, Any]] = {"nowhere": {"hidden_states": TOKENS}, "proj_out": SequenceParallelOutput(1)}


class OtherWan(WanTransformer3DModel):  # type: ignore[misc]
    """Of a model with two."""


class CentersTokens(QwenImageTransformer2DModel):  # type: ignore[misc]
    """A part of it looks at the other tokens without attention: on each rank at those of the rank alone."""

    _sp_plan = PLAN

    @functools.wraps(QwenImageTransformer2DModel.__init__)  # diffusers reads the names of the arguments
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.transformer_blocks[1].img_norm2.register_forward_hook(
            lambda _module, _args, tokens: tokens - tokens.mean(1, keepdim=True)
        )


LATE_S = 0.25


class LateRank(QwenImageTransformer2DModel):  # type: ignore[misc]
    """Rank 1 begins each forward late, as on a device that is slow."""

    _sp_plan = PLAN

    @functools.wraps(QwenImageTransformer2DModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.transformer_blocks[0].register_forward_pre_hook(_come_late)


def _come_late(*_: Any) -> None:
    if dist.is_initialized() and dist.get_rank() == 1:
        time.sleep(LATE_S)
