"""Ernie-Image: image and text are one stream whose tokens come first, `(S, B, D)`; each has its modulation beside it.

The image is cut out of the stream after the last projection, so it is gathered there.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    lengths = [max(1, tokens.text - 3 * row) for row in range(tokens.batch)]
    return {
        "hidden_states": tokens.normal(tokens.batch, 8, tokens.height, tokens.width),
        "timestep": tokens.full(500.0, tokens.batch),
        "text_bth": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "text_lens": tokens.tensor(lengths),
    }


ERNIE_IMAGE = ModelFamily(
    transformer_classes=("ErnieImageTransformer2DModel",),
    pipelines=("ErnieImagePipeline",),
    sp_plan={
        "pos_embed": {0: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True)},
        "layers.0": {"x": SequenceParallelInput(split_dim=0, expected_dims=3)},
        "layers.*": {"temb": SequenceParallelCompanion(split_dim=0, expected_dims=3)},
        "final_linear": SequenceParallelOutput(gather_dim=0, expected_dims=3),
    },
    examples={
        "ernie-image": Example(
            "ErnieImageTransformer2DModel",
            {
                "hidden_size": 144, "num_attention_heads": 12, "num_layers": 2, "ffn_hidden_size": 64,
                "in_channels": 8, "out_channels": 8, "text_in_dim": 16, "rope_axes_dim": (4, 4, 4),
            },
            _inputs,
            {"to_out": 4, "to_v": 3},
            no_mask="it takes the lengths of the texts instead",
        ),
    },
)  # fmt: skip
