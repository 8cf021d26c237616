"""Bria FIBO 2: blocks of Z-Image. The image is refined as one stream, gathered, and joined with tokens that sum up the
text; these are one stream again. Each token is modulated as noisy or as clean.
"""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.sp_plan import InputSpec, SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens) -> dict[str, Any]:
    size = 2 * tokens.height, 2 * tokens.width
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, *size),
        "timestep": tokens.full(0.5, tokens.batch),
        "encoder_hidden_states": tokens.normal(tokens.batch, 2, tokens.text, 16, seed=2),
        "context_latents": [tokens.normal(tokens.batch, 4, *size, seed=3)],
    }


_TOKENS: InputSpec = {
    "freqs_cis": SequenceParallelCompanion(split_dim=1, expected_dims=3),
    "noise_mask": SequenceParallelCompanion(split_dim=1, expected_dims=2),
}

BRIA_FIBO_2 = ModelFamily(
    transformer_classes=("BriaFibo2Transformer2DModel",),
    sp_plan={
        "noise_refiner.0": {"x": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "noise_refiner.*": _TOKENS,
        "noise_refiner.-1": SequenceParallelOutput(gather_dim=1, expected_dims=3),
        "layers.0": {"x": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "layers.*": _TOKENS,
        "layers.-1": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    local_attention=("perceiver.*", "*.cross_attention"),
    pipelines=("BriaFibo2Pipeline",),
    examples={
        "bria-fibo-2": Example(
            "BriaFibo2Transformer2DModel",
            {
                "in_channels": 4, "dim": 144, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 12, "cap_feat_dim": 16,
                "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4,
                "max_num_gist_tokens": 8, "gist_step": 2, "gist_min_text_len": 4, "gist_max_text_len": 16,
                "axes_dims": (4, 4, 4), "axes_lens": (64, 64, 64),
            },
            _inputs,
            {"adaLN_modulation": 3, "attention.to_out": 4},
            mask_input="encoder_attention_mask",
        ),
    },
)  # fmt: skip
