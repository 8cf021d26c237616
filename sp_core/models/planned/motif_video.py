"""Motif-Video: video, picture and text are streams through all blocks; the last blocks are a decoder.

Peculiarities:
- The forward makes its mask from the lengths after the embedders, and cross-attention cuts the text out of keys and
    mask by
  counting. So each stream is split at the output of its embedder, and the text's mask with the text: all of them are
  then this rank's share.
- Attention joins [video, picture, text]; cross-attention attends only to the text.
- Decoder blocks begin again with the embedded video, and join it with the encoder's output for the video: the same
    stream
  twice.
"""

from collections.abc import Mapping
from typing import Any

from sp_core.models.family import Config, Example, ModelFamily, Tokens
from sp_core.sp_plan import (
    SequenceParallelCompanion,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

_STREAM = SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True)
_ROTATION = SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True)


def _plan(config: Config) -> SequenceParallelModelPlan:
    looks = config.get("image_embed_dim") is not None
    return {
        "": {"encoder_attention_mask": SequenceParallelCompanion(split_dim=1, expected_dims=2)},
        "rope": {0: _ROTATION, 1: _ROTATION},
        "x_embedder": {0: _STREAM},
        **({"image_embedder": {0: _STREAM}} if looks else {}),
        "context_embedder": {0: _STREAM},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="x_embedder.0"),
    }


def _decoders(config: Config) -> Mapping[str, str]:
    last = config.get("num_single_layers", 40)
    first = last - config.get("num_decoder_layers", 0)
    return {f"single_transformer_blocks.{i}.attn": "x_embedder.0+x_embedder.0" for i in range(first, last)}


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.frames, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.full(500.0, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
    }


def _image_inputs(tokens: Tokens) -> dict[str, Any]:
    return _inputs(tokens) | {"image_embeds": tokens.normal(tokens.batch, 5, 8, seed=3)}


_TINY: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 12, "attention_head_dim": 12, "num_layers": 1,
    "num_single_layers": 2, "num_decoder_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 16,
    "rope_axes_dim": (4, 4, 4), "enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True,
}  # fmt: skip
_GAINS = {"norm1": 3, "norm.linear": 3, "add_v_proj": 3, "to_out": 4}

MOTIF_VIDEO = ModelFamily(
    transformer_classes=("MotifVideoTransformer3DModel",),
    pipelines=("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
    sp_plan=_plan,
    own_stream=_decoders,
    keys_of={"*.cross_attn": "context_embedder.0"},
    examples={
        "motif-video": Example(
            "MotifVideoTransformer3DModel", _TINY, _inputs, _GAINS, mask_input="encoder_attention_mask"
        ),
        "motif-video image": Example(
            "MotifVideoTransformer3DModel",
            _TINY | {"image_embed_dim": 8},
            _image_inputs,
            _GAINS,
            mask_input="encoder_attention_mask",
        ),
    },
)
