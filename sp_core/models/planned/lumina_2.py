"""Lumina 2: text and image are refined on every rank, then joined in front of the layers into one stream."""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * tokens.height, 2 * tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(0.5, tokens.batch),
    }


LUMINA_2 = ModelFamily(
    transformer_classes=("Lumina2Transformer2DModel",),
    pipelines=("Lumina2Pipeline",),
    sp_plan={
        "rope_embedder": {3: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "layers.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "norm_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    local_attention=("noise_refiner.*", "context_refiner.*"),
    captured_processors=("Lumina2AttnProcessor2_0",),
    examples={
        "lumina-2": Example(
            "Lumina2Transformer2DModel",
            {
                "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 144, "num_layers": 2,
                "num_refiner_layers": 1, "num_attention_heads": 12, "num_kv_heads": 12, "multiple_of": 16,
                "axes_dim_rope": (4, 4, 4), "axes_lens": (300, 64, 64), "cap_feat_dim": 16,
            },
            _inputs,
            mask_input="encoder_attention_mask",
            counts_mask=True,
        ),
    },
)  # fmt: skip
