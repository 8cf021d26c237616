"""HunyuanVideo: two streams, video and text, side by side in the first blocks and then as one.

Peculiarities:
- The split is at the first block, not at the embedders: after these the forward reads the whole video length to make
  its mask, and the text refiner averages over the whole text.
- Attention joins [video, text], so the plan names the video stream first. The mask `(B, 1, 1, S)` spans all keys in
  that order; it stays out of the plan, and attention picks each rank's part.
- The refiner's attention runs before the region, on the whole text, and stays local.
- Image to video by token replacement: the first frame's tokens are modulated on their own, as "the first n tokens";
  each rank needs its part of that count. Only the blocks of that variant have the parameter.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sp_core.models.family import Example, FusedGelu, ModelFamily, Tokens
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


def _inputs(tokens: Tokens, guidance: bool = True) -> dict[str, Any]:
    """Two frames, so that replacing the tokens of the first differs from replacing all of them."""
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * tokens.frames, tokens.height, tokens.width),
        "timestep": tokens.full(500.0, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "pooled_projections": tokens.normal(tokens.batch, 8, seed=3),
        "guidance": tokens.full(6000.0, tokens.batch) if guidance else None,
    }


_TINY = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1,
    "mlp_ratio": 2.0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 4, 4), "attention_head_dim": 12, "num_attention_heads": 12,
}  # fmt: skip


def _example(inputs: Callable[[Tokens], dict[str, Any]], **init: object) -> Example:
    return Example(
        "HunyuanVideoTransformer3DModel",
        _TINY | init,
        inputs,
        gains={"norm1.linear": 3, "norm.linear": 3},
        mask_input="encoder_attention_mask",
        counts_mask=True,
    )


HUNYUAN_VIDEO = ModelFamily(
    transformer_classes=("HunyuanVideoTransformer3DModel",),
    pipelines=("HunyuanVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    sp_plan=_plan,
    local_attention=("context_embedder.*",),
    replacements=(FusedGelu(("transformer_blocks.*.ff.net.0", "transformer_blocks.*.ff_context.net.0")),),
    examples={
        "hunyuan-video": _example(_inputs),
        "hunyuan-video token replace": _example(
            lambda tokens: _inputs(tokens, guidance=False),
            image_condition_type="token_replace",
            guidance_embeds=False,
        ),
    },
)
