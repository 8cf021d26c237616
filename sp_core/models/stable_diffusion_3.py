"""Stable Diffusion 3 and 3.5: two streams, image and text; 3.5 medium has blocks that also attend to the image alone.

Peculiarities:
- Its processor calls torch's attention directly, not diffusers' dispatch: the calls are captured.
- Attention joins [image, text], so the plan names the image stream first. `attn2` sees the image alone.
- `attn` and `attn2` of a block share one processor object; the module tells them apart.
- ControlNet residuals are a list, a tuple or None, as long as the image.
- The last block returns no text.
"""

from typing import Any

from sp_core.models.family import Example, FusedGelu, ModelFamily, SharedModulation, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput


def _inputs(tokens: Tokens, residuals: int = 0) -> dict[str, Any]:
    image = tokens.height * tokens.width
    control = [tokens.normal(tokens.batch, image, 144, seed=10 + i) for i in range(residuals)]
    return {
        "hidden_states": tokens.normal(tokens.batch, 4, 2 * tokens.height, 2 * tokens.width),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "pooled_projections": tokens.normal(tokens.batch, 8, seed=3),
        "timestep": tokens.full(500.0, tokens.batch),
        "block_controlnet_hidden_states": control or None,
    }


_TINY = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16,
    "caption_projection_dim": 144, "pooled_projection_dim": 8, "pos_embed_max_size": 8, "attention_head_dim": 12,
    "num_attention_heads": 12,
}  # fmt: skip
_GAINS = {"norm1.linear": 3, "norm1_context.linear": 3}

STABLE_DIFFUSION_3 = ModelFamily(
    transformer_classes=("SD3Transformer2DModel",),
    pipelines=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
    ),
    sp_plan={
        "": {"block_controlnet_hidden_states": SequenceParallelCompanion(split_dim=1, expected_dims=3)},
        "transformer_blocks.0": {
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    own_stream={"*.attn2": "hidden_states"},
    captured_processors=("JointAttnProcessor2_0",),
    replacements=(
        FusedGelu(("transformer_blocks.*.ff.net.0", "transformer_blocks.*.ff_context.net.0")),
        SharedModulation(
            "time_text_embed",
            ("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear"),
            silu=True,
            timestep_only=False,  # the pooled prompt
        ),
    ),
    examples={
        "sd3": Example(
            "SD3Transformer2DModel",
            _TINY,
            lambda tokens: _inputs(tokens, residuals=2),
            _GAINS | {"attn.to_q": 3, "attn.to_k": 3, "add_q": 3, "add_k": 3},
        ),
        "sd3.5": Example(
            "SD3Transformer2DModel",
            _TINY | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
            _inputs,
            _GAINS,
        ),
    },
)
