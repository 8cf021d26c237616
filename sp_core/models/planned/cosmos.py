"""Cosmos 1 and 2: video tokens attend to themselves; text is only attended to and stays whole.

Attention goes to diffusers' dispatch without a configuration, and is captured behind it. A padding mask is a further
channel of the picture, before there are tokens.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.frames, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.full(0.5, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "fps": 30,
        "padding_mask": tokens.full(0.5, 1, 1, 2 * tokens.height, 2 * tokens.width),
    }


COSMOS = ModelFamily(
    transformer_classes=("CosmosTransformer3DModel",),
    sp_plan={
        "rope": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "learnable_pos_embed": {0: SequenceParallelCompanion(split_dim=1, expected_dims=3, split_output=True)},
        "transformer_blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    refused_pipelines=dict.fromkeys(
        (
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "Cosmos2TextToImagePipeline",
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
        ),
        "it checks prompts and pictures with cosmos_guardrail, which spray does not install",
    ),
    local_attention=("*.attn2",),
    captured_processors=("CosmosAttnProcessor2_0",),
    examples={
        "cosmos": Example(
            "CosmosTransformer3DModel",
            {
                "in_channels": 4, "out_channels": 4, "num_attention_heads": 12, "attention_head_dim": 16,
                "num_layers": 2, "mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 4,
                "max_size": (4, 32, 32),
            },
            _inputs,
            {"attn1.to_out": 4, "attn1.to_v": 3},
            no_mask="its mask is that of the text, which stays whole",
        ),
    },
)  # fmt: skip
