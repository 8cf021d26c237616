"""Kandinsky 5: image or video tokens attend to themselves; text is encoded by blocks of its own and stays whole.

The rotation rounds queries and keys to bfloat16, also of a model in fp32. Every block takes the rotations anew.
"""

from typing import Any

from sp_core.models.family import Config, Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    places = (tokens.frames, tokens.height, tokens.width)
    return {
        "hidden_states": tokens.normal(tokens.batch, tokens.frames, 2 * tokens.height, 2 * tokens.width, 4),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(500.0, tokens.batch),
        "pooled_projections": tokens.normal(tokens.batch, 8, seed=3),
        "visual_rope_pos": [tokens.tensor(list(range(count))) for count in places],
        "text_rope_pos": tokens.tensor(list(range(tokens.text))),
    }


def _refuses(config: Config) -> str:
    if config.get("attention_type", "regular") == "nabla":
        return "its sparse attention (attention_type nabla) chooses blocks of tokens of the whole sequence"
    return ""


KANDINSKY_5 = ModelFamily(
    transformer_classes=("Kandinsky5Transformer3DModel",),
    pipelines=("Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline", "Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"),
    refuses=_refuses,
    rounds="its rotation rounds queries and keys to bfloat16",
    sp_plan={
        "visual_transformer_blocks.0": {"visual_embed": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "visual_transformer_blocks.*": {"rope": SequenceParallelCompanion(split_dim=1, expected_dims=6)},
        "visual_transformer_blocks.-1": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    local_attention=("text_transformer_blocks.*", "*.cross_attention"),
    examples={
        "kandinsky-5": Example(
            "Kandinsky5Transformer3DModel",
            {
                "in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4,
                "model_dim": 144, "ff_dim": 192, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4),
            },
            _inputs,
            {"self_attention.out_layer": 4, "self_attention.to_value": 3},
            no_mask="its text is whole, and padded by nothing",
        ),
    },
)  # fmt: skip
