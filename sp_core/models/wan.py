"""Wan 2.1 and 2.2: video tokens attend to themselves; text and image prompts are only attended to and stay whole.

Peculiarities:
- The model's forward flattens and transposes inline, so the first block is the first module that sees the sequence.
- Cross-attention passes no parallel configuration on and stays local: every rank has the whole text. Image to video
  puts the image's tokens before the text and separates them by counting 512 of text, which is right only while whole.
- Text+image-to-video gives one timestep per token, `(B, S)`. It is split at the root, so everything derived from it
  is this rank's own: modulation in the blocks and, in the model's forward, before the last projection. The
  other variants give one per sample, `(B,)`, which the same entry leaves whole.
- Wan 2.2 A14B has two transformers that take turns; parallelize both, each has its own context.
- VACE runs a second stack of blocks on control tokens, of the same length as the video's, and adds their outputs to
  the video's: one stream, split three times, of which one split counts as the stream.
"""

from collections.abc import Mapping
from typing import Any

from sp_core.models.family import Example, FusedGelu, GuidanceBatch, ModelFamily, Tokens
from sp_core.sp_plan import (
    OptionalSequenceParallelInput,
    SequenceParallelCompanion,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)
from sp_core.tp_plan import AcrossHeads, Colwise, Heads, Rowwise, TensorParallelPlan

_ROPE_AND_OUTPUT: SequenceParallelModelPlan = {
    "rope": {
        0: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True),
        1: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True),
    },
    "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
}

_TP: TensorParallelPlan = {
    "*blocks.*.attn[12]": Heads(),
    "*blocks.*.attn[12].to_[qkv]": Colwise(),
    "*blocks.*.attn[12].norm_[qk]": AcrossHeads(),
    "*blocks.*.attn[12].to_out.0": Rowwise(),
    "*blocks.*.ffn.net.0.proj": Colwise(),
    "*blocks.*.ffn.net.2": Rowwise(),
}


def _tp_plan(config: Mapping[str, Any]) -> TensorParallelPlan:
    if config.get("added_kv_proj_dim") is None:
        return _TP
    of_images: TensorParallelPlan = {
        "*blocks.*.attn2.add_[kv]_proj": Colwise(),
        "*blocks.*.attn2.norm_added_k": AcrossHeads(),
    }
    return {**_TP, **of_images}


def _inputs(tokens: Tokens, frames: int | None = None, text: int | None = None) -> dict[str, Any]:
    frames, text = frames or tokens.frames, text or tokens.text
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, frames, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.full(500.0, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, text, 16, seed=2),
    }


def _per_token_inputs(tokens: Tokens) -> dict[str, Any]:
    count = tokens.frames * tokens.height * tokens.width
    return _inputs(tokens) | {"timestep": tokens.ramp(900.0, tokens.batch, count)}


def _image_inputs(tokens: Tokens) -> dict[str, Any]:
    """Always 512 tokens of text: the model takes everything before the last 512 for the image's."""
    return _inputs(tokens, text=512) | {
        "hidden_states": tokens.normal(tokens.batch, 9, tokens.frames, 2 * tokens.height, 2 * tokens.width),
        "encoder_hidden_states_image": tokens.normal(tokens.batch, 5, 8, seed=3),
    }


def _vace_inputs(tokens: Tokens) -> dict[str, Any]:
    """Two frames, and control for the first; the model pads the control."""
    size = tokens.frames, 2 * tokens.height, 2 * tokens.width
    return _inputs(tokens, frames=2 * tokens.frames) | {
        "control_hidden_states": tokens.normal(tokens.batch, 6, *size, seed=3),
        "control_hidden_states_scale": tokens.tensor([1.0, 0.5]),
    }


_TINY = {
    "num_attention_heads": 12, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}  # fmt: skip
_GAINS = {"attn1.to_out": 4, "scale_shift_table": 4}

WAN = ModelFamily(
    transformer_classes=("WanTransformer3DModel",),
    pipelines=("WanImageToVideoPipeline", "WanVideoToVideoPipeline", "LucyEditPipeline"),
    sp_plan=_ROPE_AND_OUTPUT
    | {
        "": {"timestep": OptionalSequenceParallelInput(split_dim=1, expected_dims=2)},
        "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
    },
    tp_plan=_tp_plan,
    local_attention=("*.attn2",),
    replacements=(FusedGelu(("*blocks.*.ffn.net.0",)),),
    guidance_batch=GuidanceBatch("encoder_hidden_states", ("hidden_states", "timestep")),
    examples={
        "wan": Example("WanTransformer3DModel", _TINY, _inputs, _GAINS),
        "wan per token": Example("WanTransformer3DModel", _TINY, _per_token_inputs, _GAINS),
        "wan image": Example(
            "WanTransformer3DModel",
            _TINY | {"in_channels": 9, "image_dim": 8, "added_kv_proj_dim": 144},
            _image_inputs,
            _GAINS,
        ),
    },
)

WAN_VACE = ModelFamily(
    transformer_classes=("WanVACETransformer3DModel",),
    pipelines=("WanVACEPipeline",),
    sp_plan=_ROPE_AND_OUTPUT
    | {
        "vace_blocks.0": {
            "control_hidden_states": SequenceParallelCompanion(split_dim=1, expected_dims=3),
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "blocks.0": {"hidden_states": SequenceParallelCompanion(split_dim=1, expected_dims=3)},
    },
    tp_plan=_tp_plan,
    local_attention=("*.attn2",),
    replacements=(FusedGelu(("*blocks.*.ffn.net.0",)),),
    examples={
        "wan vace": Example(
            "WanVACETransformer3DModel",
            _TINY | {"num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 6},
            _vace_inputs,
            _GAINS,
        ),
    },
)
