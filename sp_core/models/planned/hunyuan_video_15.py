"""HunyuanVideo 1.5: video and text are two streams through all blocks; the text is refined and sorted before.

Attention joins [video, text]. Its processors make the mask, of queries and keys, from that of the text.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.frames, tokens.height, tokens.width),
        "timestep": tokens.full(500.0, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "encoder_hidden_states_2": tokens.normal(tokens.batch, 5, 8, seed=4),
        "encoder_attention_mask_2": tokens.tensor([[True] * 3 + [False] * 2] * tokens.batch),
        "image_embeds": tokens.full(0.0, tokens.batch, 3, 8),
    }


HUNYUAN_VIDEO_15 = ModelFamily(
    transformer_classes=("HunyuanVideo15Transformer3DModel",),
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    sp_plan={
        "rope": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "transformer_blocks.0": {
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "transformer_blocks.*": {"attention_mask": SequenceParallelCompanion(split_dim=1, expected_dims=2)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    local_attention=("context_embedder.*",),
    masks_queries=("transformer_blocks.*",),
    examples={
        "hunyuan-video-15": Example(
            "HunyuanVideo15Transformer3DModel",
            {
                "in_channels": 4, "out_channels": 4, "num_attention_heads": 12, "attention_head_dim": 12,
                "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 16,
                "text_embed_2_dim": 8, "image_embed_dim": 8, "rope_axes_dim": (4, 4, 4), "target_size": 16,
                "task_type": "t2v",
            },
            _inputs,
            {"norm1.linear": 3, "to_out": 4},
            mask_input="encoder_attention_mask",
            counts_mask=True,
        ),
    },
)  # fmt: skip
