"""HunyuanVideo Framepack: like HunyuanVideo, with earlier frames in front of the video's tokens.

The video is cut out of the stream after the last block, so it is gathered there.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import InputSpec, SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    size = 2 * tokens.height, 2 * tokens.width
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, tokens.frames, *size),
        "timestep": tokens.full(500.0, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "pooled_projections": tokens.normal(tokens.batch, 8, seed=3),
        "image_embeds": tokens.normal(tokens.batch, 3, 8, seed=4),
        "indices_latents": tokens.tensor([float(7 + at) for at in range(tokens.frames)]),
        "guidance": tokens.full(6000.0, tokens.batch),
        "latents_clean": tokens.normal(tokens.batch, 4, 1, *size, seed=5),
        "indices_latents_clean": tokens.tensor([0.0]),
        "latents_history_2x": tokens.normal(tokens.batch, 4, 2, *size, seed=6),
        "indices_latents_history_2x": tokens.tensor([1.0, 2.0]),
        "latents_history_4x": tokens.normal(tokens.batch, 4, 4, *size, seed=7),
        "indices_latents_history_4x": tokens.tensor([3.0, 4.0, 5.0, 6.0]),
    }


_FREQUENCIES: InputSpec = {"freqs_cis": SequenceParallelCompanion(split_dim=0, expected_dims=2)}

FRAMEPACK = ModelFamily(
    transformer_classes=("HunyuanVideoFramepackTransformer3DModel",),
    pipelines=("HunyuanVideoFramepackPipeline",),
    sp_plan={
        "transformer_blocks.0": {
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "transformer_blocks.*": _FREQUENCIES,
        "single_transformer_blocks.*": {"image_rotary_emb": SequenceParallelCompanion(split_dim=0, expected_dims=2)},
        "single_transformer_blocks.-1": [
            SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
            None,
        ],
    },
    local_attention=("context_embedder.*",),
    examples={
        "framepack": Example(
            "HunyuanVideoFramepackTransformer3DModel",
            {
                "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1,
                "mlp_ratio": 2.0, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 16,
                "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4), "attention_head_dim": 12,
                "num_attention_heads": 12, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True,
            },
            _inputs,
            {"norm1.linear": 3, "norm.linear": 3},
            mask_input="encoder_attention_mask",
            counts_mask=True,
        ),
    },
)  # fmt: skip
