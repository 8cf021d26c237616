"""Ideogram 4: text and image are one stream from the beginning. A mask keeps the samples of a packed batch apart."""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    image = tokens.height * tokens.width
    total = tokens.text + image
    places = [[at, at, at] for at in range(tokens.text)]
    places += [[65536, at // tokens.width, at % tokens.width] for at in range(image)]
    return {
        "hidden_states": tokens.normal(tokens.batch, total, 8),
        "timestep": tokens.full(0.5, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, total, 16, seed=2),
        "position_ids": tokens.tensor([places] * tokens.batch),
        "segment_ids": tokens.tensor([[int(at == 0) for at in range(total)]] * tokens.batch),
        "indicator": tokens.tensor([[3] * tokens.text + [2] * image] * tokens.batch),
    }


IDEOGRAM_4 = ModelFamily(
    transformer_classes=("Ideogram4Transformer2DModel",),
    sp_plan={
        "rotary_emb": {
            0: SequenceParallelCompanion(split_dim=1, expected_dims=3, split_output=True),
            1: SequenceParallelCompanion(split_dim=1, expected_dims=3, split_output=True),
        },
        "layers.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "final_layer": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    pipelines=("Ideogram4Pipeline",),
    examples={
        "ideogram-4": Example(
            "Ideogram4Transformer2DModel",
            {
                "in_channels": 8, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 12,
                "intermediate_size": 64, "adaln_dim": 16, "llm_features_dim": 16, "mrope_section": (2, 2, 2),
            },
            _inputs,
            {"attention.": 3},
            no_mask="it takes the segments of a packed batch instead",
        ),
    },
)  # fmt: skip
