"""Allegro: video tokens attend to themselves; text is only attended to and stays whole.

The pipeline makes the rotations: tables, which stay whole, and beside them the place of each token in these.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    count = tokens.frames * tokens.height * tokens.width
    tables = tuple((tokens.normal(9, 8, seed=seed), tokens.normal(9, 8, seed=seed + 1)) for seed in (5, 7, 9))
    places = tuple(tokens.tensor([[at // step % 9 for at in range(count)]]) for step in (1, 2, 3))
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.frames, 2 * tokens.height, 2 * tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(500.0, tokens.batch),
        "image_rotary_emb": (tables, places),
    }


ALLEGRO = ModelFamily(
    transformer_classes=("AllegroTransformer3DModel",),
    pipelines=("AllegroPipeline",),
    sp_plan={
        "": {"image_rotary_emb": [None, SequenceParallelCompanion(split_dim=1, expected_dims=2)]},
        "transformer_blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    local_attention=("*.attn2",),
    captured_processors=("AllegroAttnProcessor2_0",),
    examples={
        "allegro": Example(
            "AllegroTransformer3DModel",
            {
                "num_attention_heads": 12, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
                "num_layers": 2, "cross_attention_dim": 288, "sample_height": 8, "sample_width": 8,
                "sample_frames": 4, "caption_channels": 16,
            },
            _inputs,
            {"attn1.to_out": 4, "attn1.to_v": 3},
            mask_input="encoder_attention_mask",
            no_length={"short": "its blocks fail where a rank holds one token"},
        ),
    },
)  # fmt: skip
