"""Krea 2: text and image are one stream from the first block on; several layers of the text encoder are fused before.

The image is cut out of the stream after the last block, so it is gathered there.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    image = tokens.height * tokens.width
    places = [[0.0, float(at // tokens.width), float(at % tokens.width)] for at in range(image)]
    return {
        "hidden_states": tokens.normal(tokens.batch, image, 8),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 3, 16, seed=2),
        "timestep": tokens.full(0.5, tokens.batch),
        "position_ids": tokens.tensor([[0.0] * 3] * tokens.text + places),
    }


KREA_2 = ModelFamily(
    transformer_classes=("Krea2Transformer2DModel",),
    pipelines=("Krea2Pipeline",),
    sp_plan={
        "rotary_emb": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "transformer_blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "transformer_blocks.-1": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    local_attention=("text_fusion.*",),
    examples={
        "krea-2": Example(
            "Krea2Transformer2DModel",
            {
                "in_channels": 8, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 12,
                "num_key_value_heads": 6, "intermediate_size": 64, "timestep_embed_dim": 16, "text_hidden_dim": 16,
                "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
                "text_intermediate_size": 32, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
                "axes_dims_rope": (4, 4, 4),
            },
            _inputs,
            {"time_mod_proj": 3, "to_out": 4, "to_v": 3},
            mask_input="encoder_attention_mask",
        ),
    },
)  # fmt: skip
