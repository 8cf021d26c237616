"""Sana and SANA-Video: linear self-attention, text that is only attended to, and convolutions in the feed-forward.

Peculiarities:
- Blocks put their tokens back onto the grid of the picture for the feed-forward. A share of the tokens is no grid, so
    each
  block gets it as one line, and the convolutions get the neighboring tokens of other ranks.
- SANA-Video convolves along rows and columns in each frame, then along frames.
- Image to video has a timestep for each token, `(B, S)`; all other requests have one for each sample, `(B, 1)`. Its
    embedding
  is split where blocks and the last norm take it.
- ControlNet residuals are a list or None, as long as the image.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import (
    SequenceParallelCompanion,
    SequenceParallelConvolution,
    SequenceParallelGrid,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_STREAM_AND_OUTPUT: SequenceParallelModelPlan = {
    "transformer_blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
    "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
}
_PER_TOKEN = SequenceParallelCompanion(split_dim=1, expected_dims=3)
_ROTATION = SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True)


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.height, tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(500.0, tokens.batch),
    }


def _control_inputs(tokens: Tokens) -> dict[str, Any]:
    image = tokens.height * tokens.width
    return _inputs(tokens) | {"controlnet_block_samples": (tokens.normal(tokens.batch, image, 144, seed=10),)}


def _sprint_inputs(tokens: Tokens) -> dict[str, Any]:
    return _inputs(tokens) | {"guidance": tokens.full(0.45, tokens.batch)}


def _video_inputs(tokens: Tokens) -> dict[str, Any]:
    """Three frames."""
    size = 3 * tokens.frames, 2 * tokens.height, 2 * tokens.width
    return _inputs(tokens) | {"hidden_states": tokens.normal(tokens.batch, 4, *size)}


def _per_token_inputs(tokens: Tokens) -> dict[str, Any]:
    size = 3 * tokens.frames, tokens.height, tokens.width
    return _video_inputs(tokens) | {"timestep": tokens.ramp(900.0, tokens.batch, 1, *size)}


_TINY: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 12, "attention_head_dim": 12, "num_layers": 2,
    "num_cross_attention_heads": 6, "cross_attention_head_dim": 24, "cross_attention_dim": 144, "caption_channels": 16,
}  # fmt: skip
_GAINS = {"attn1.to_out": 2, "attn2.to_out": 0.03, "conv_depth": 2, "conv_temp": 2, "scale_shift_table": 2}
"""The model hides a text by adding -10000 to its scores. If all of it is hidden, the last digit of the scores is 1e-3,
and a last-bit difference changes the output of cross-attention by as much, so that output must count little."""

SANA = ModelFamily(
    transformer_classes=("SanaTransformer2DModel",),
    pipelines=("SanaPipeline", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "SanaControlNetPipeline"),
    sp_plan=_STREAM_AND_OUTPUT
    | {
        "": {"controlnet_block_samples": SequenceParallelCompanion(split_dim=1, expected_dims=3)},
        "transformer_blocks.*": {"height": SequenceParallelGrid(), "width": SequenceParallelGrid()},
        "transformer_blocks.*.ff.conv_depth": SequenceParallelConvolution(rows="height"),
    },
    local_attention=("*.attn2",),
    linear_processors=("SanaLinearAttnProcessor2_0",),
    examples={
        "sana": Example("SanaTransformer2DModel", _TINY, _control_inputs, _GAINS, mask_input="encoder_attention_mask"),
        "sana sprint": Example(
            "SanaTransformer2DModel",
            _TINY | {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
            _sprint_inputs,
            _GAINS,
            mask_input="encoder_attention_mask",
        ),
    },
)
SANA_VIDEO = ModelFamily(
    transformer_classes=("SanaVideoTransformer3DModel",),
    pipelines=("SanaVideoPipeline", "SanaImageToVideoPipeline"),
    sp_plan=_STREAM_AND_OUTPUT
    | {
        "rope": {0: _ROTATION, 1: _ROTATION},
        "transformer_blocks.*": {
            "timestep": _PER_TOKEN,
            "frames": SequenceParallelGrid(),
            "height": SequenceParallelGrid(),
            "width": SequenceParallelGrid(),
        },
        "transformer_blocks.*.ff.conv_depth": SequenceParallelConvolution(rows="height"),
        "transformer_blocks.*.ff.conv_temp": SequenceParallelConvolution(rows="frames"),
        "norm_out": {"temb": _PER_TOKEN},
    },
    local_attention=("*.attn2",),
    linear_processors=("SanaLinearAttnProcessor3_0",),
    examples={
        "sana-video": Example(
            "SanaVideoTransformer3DModel", _TINY, _video_inputs, _GAINS, mask_input="encoder_attention_mask"
        ),
        "sana-video per token": Example(
            "SanaVideoTransformer3DModel", _TINY, _per_token_inputs, _GAINS, mask_input="encoder_attention_mask"
        ),
    },
)
