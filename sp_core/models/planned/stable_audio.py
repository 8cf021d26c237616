"""Stable Audio: sound is one stream, with a token for the request in front; text is only attended to and stays whole.

Its pipeline makes sound, which spray does not serve.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    length = tokens.height * tokens.width
    return {
        "hidden_states": tokens.normal(tokens.batch, 8, length),
        "timestep": tokens.full(0.5, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "global_hidden_states": tokens.normal(tokens.batch, 1, 24, seed=3),
        "rotary_embedding": (tokens.normal(length + 1, 8, seed=5), tokens.normal(length + 1, 8, seed=6)),
    }


STABLE_AUDIO = ModelFamily(
    transformer_classes=("StableAudioDiTModel",),
    sp_plan={
        "": {"rotary_embedding": SequenceParallelCompanion(split_dim=0, expected_dims=2)},
        "transformer_blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    local_attention=("*.attn2",),
    captured_processors=("StableAudioAttnProcessor2_0",),
    examples={
        "stable-audio": Example(
            "StableAudioDiTModel",
            {
                "sample_size": 16, "in_channels": 8, "num_layers": 2, "attention_head_dim": 16,
                "num_attention_heads": 12, "num_key_value_attention_heads": 6, "out_channels": 8,
                "cross_attention_dim": 96, "time_proj_dim": 16, "global_states_input_dim": 24,
                "cross_attention_input_dim": 16,
            },
            _inputs,
            {"attn1.to_out": 4, "attn1.to_v": 3},
            no_mask="its pipeline gives it none",
        ),
    },
)  # fmt: skip
