"""OmniGen: text, timestep and image are one stream, with a mask that hides the image from the text.

The image is cut out of the stream after the last layer, so it is gathered there.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    image = tokens.height * tokens.width
    total = tokens.text + 1 + image
    sees = [[float(key <= query or query > tokens.text) for key in range(total)] for query in range(total)]
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.full(0.5, tokens.batch),
        "input_ids": tokens.tensor([[(7 * at + row) % 30 for at in range(tokens.text)] for row in range(tokens.batch)]),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": tokens.tensor([sees] * tokens.batch),
        "position_ids": tokens.tensor([list(range(total))] * tokens.batch),
    }


OMNI_GEN = ModelFamily(
    transformer_classes=("OmniGenTransformer2DModel",),
    sp_plan={
        "rope": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "layers.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "layers.-1": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    captured_processors=("OmniGenAttnProcessor2_0",),
    examples={
        "omni-gen": Example(
            "OmniGenTransformer2DModel",
            {
                "in_channels": 4, "hidden_size": 144, "num_attention_heads": 12, "num_key_value_heads": 12,
                "intermediate_size": 64, "num_layers": 2, "pad_token_id": 0, "vocab_size": 32,
                "rope_scaling": {"short_factor": [1.0] * 6, "long_factor": [1.0] * 6}, "pos_embed_max_size": 32,
                "time_step_dim": 16,
            },
            _inputs,
            {"to_out": 4, "to_v": 3},
            no_mask="it takes a mask of its own over all tokens",
        ),
    },
)  # fmt: skip
