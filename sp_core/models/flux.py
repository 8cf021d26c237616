"""Flux: two streams, text and image, side by side in the first blocks and then as one.

Peculiarities:
- Both streams and their positions are split on entry, before anything derives from them: rotations, modulation and
  both kinds of block then see only this rank's tokens, and the forward's own `cat` joins shares with shares.
- Attention joins [text, image], so the plan names the text stream first.
- Positions are `(S, 3)`, or `(B, S, 3)` from older callers: hence the negative dimension.
- ControlNet residuals are a list, a tuple or None, each as long as the image; there may be fewer than blocks.
- The single-stream blocks have a `proj_out` too; the plan gathers the model's.
"""

from typing import Any

from sp_core.models.family import Example, FusedGelu, ModelFamily, SharedModulation, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput
from sp_core.tp_plan import Colwise, Rowwise


def _inputs(tokens: Tokens) -> dict[str, Any]:
    image = tokens.height * tokens.width
    return {
        "hidden_states": tokens.normal(tokens.batch, image, 8),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "pooled_projections": tokens.normal(tokens.batch, 8, seed=3),
        "timestep": tokens.full(0.5, tokens.batch),
        "img_ids": tokens.tensor([[3.0 * i, 3.0 * i + 1, 3.0 * i + 2] for i in range(image)]),
        "txt_ids": tokens.full(0.0, tokens.text, 3),
    }


def _control_inputs(tokens: Tokens) -> dict[str, Any]:
    """Residuals as a list and as a tuple; positions with a batch dimension, as older callers pass them."""
    inputs, image = _inputs(tokens), tokens.height * tokens.width
    return inputs | {
        "controlnet_block_samples": [tokens.normal(tokens.batch, image, 144, seed=10 + i) for i in range(2)],
        "controlnet_single_block_samples": (tokens.normal(tokens.batch, image, 144, seed=20),),
        "img_ids": inputs["img_ids"][None],
        "txt_ids": inputs["txt_ids"][None],
    }


_TINY = {
    "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 16, "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 4, 4), "attention_head_dim": 12, "num_attention_heads": 12,
}  # fmt: skip
_GAINS = {"norm1.linear": 3, "norm.linear": 3}

FLUX = ModelFamily(
    transformer_classes=("FluxTransformer2DModel",),
    pipelines=(
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxKontextInpaintPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    ),
    sp_plan={
        "": {
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "txt_ids": SequenceParallelCompanion(split_dim=-2),
            "img_ids": SequenceParallelCompanion(split_dim=-2),
            "controlnet_block_samples": SequenceParallelCompanion(split_dim=1, expected_dims=3),
            "controlnet_single_block_samples": SequenceParallelCompanion(split_dim=1, expected_dims=3),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    tp_plan={
        "*transformer_blocks.*.attn.to_[qkv]": Colwise(),
        "transformer_blocks.*.attn.add_[qkv]_proj": Colwise(),
        "transformer_blocks.*.attn.to_out.0": Rowwise(),
        "transformer_blocks.*.attn.to_add_out": Rowwise(),
        "transformer_blocks.*.ff.net.0.proj": Colwise(),
        "transformer_blocks.*.ff.net.2": Rowwise(),
        "transformer_blocks.*.ff_context.net.0.proj": Colwise(),
        "transformer_blocks.*.ff_context.net.2": Rowwise(),
        "single_transformer_blocks.*.proj_mlp": Colwise(),
        "single_transformer_blocks.*.proj_out": Rowwise(),  # the model knows its two blocks: attention and MLP
    },
    refused_processors={
        "FluxIPAdapterAttnProcessor": "it attends to image prompts the same way as to the sequence",
    },
    replacements=(
        FusedGelu(("transformer_blocks.*.ff.net.0", "transformer_blocks.*.ff_context.net.0")),
        SharedModulation(
            "time_text_embed",
            (
                "transformer_blocks.*.norm1.linear",
                "transformer_blocks.*.norm1_context.linear",
                "single_transformer_blocks.*.norm.linear",
            ),
            silu=True,
            timestep_only=False,  # the pooled prompt
        ),
    ),
    examples={
        "flux": Example("FluxTransformer2DModel", _TINY, _inputs, _GAINS),
        "flux control": Example("FluxTransformer2DModel", _TINY, _control_inputs, _GAINS),
    },
)
