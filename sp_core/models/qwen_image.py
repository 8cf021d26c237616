"""Qwen-Image: two streams, text and image, joined in every attention.

Peculiarities:
- The pipeline packs the latents, so image tokens exist when the transformer is entered; text arrives embedded.
- The text mask stays whole until the blocks: the forward derives the text length from it.
- Each block gets the mask and `modulate_index` (editing models) again, hence the `*` entry; both are cheap views.
- `pos_embed` returns one rotation per image token and one per text token, without a batch dimension.
- Attention joins [text, image], so the plan names the text stream first. On each rank the order is [its text, its
  image]. One process orders the keys differently; softmax does not depend on it.
- Editing appends the reference images' tokens to the image's; `modulate_index` then says which timestep each has.
- ControlNet residuals are a list or None, as long as the image tokens.
- A native size needs the ragged split: 1328x1328 pixels are 83x83 = 6889 tokens, an odd number.
"""

from collections.abc import Callable
from typing import Any

from sp_core.models.family import Example, FusedGelu, GuidanceBatch, ModelFamily, RealRotation, SharedModulation, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput
from sp_core.tp_plan import Colwise, Rowwise


def _inputs(tokens: Tokens) -> dict[str, Any]:
    return {
        "hidden_states": tokens.normal(tokens.batch, tokens.height * tokens.width, 16),
        "encoder_hidden_states": tokens.normal(tokens.batch, tokens.text, 16, seed=2),
        "timestep": tokens.full(0.5, tokens.batch),
        "img_shapes": [[(1, tokens.height, tokens.width)]] * tokens.batch,
    }


def _edit_inputs(tokens: Tokens) -> dict[str, Any]:
    """One reference image, as large as the image."""
    return _inputs(tokens) | {
        "hidden_states": tokens.normal(tokens.batch, 2 * tokens.height * tokens.width, 16),
        "img_shapes": [[(1, tokens.height, tokens.width)] * 2] * tokens.batch,
    }


def _control_inputs(tokens: Tokens) -> dict[str, Any]:
    """One residual for two blocks."""
    residual = tokens.normal(tokens.batch, tokens.height * tokens.width, 144, seed=10)
    return _inputs(tokens) | {"controlnet_block_samples": [residual]}


_TINY = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 4), "attention_head_dim": 12, "num_attention_heads": 12,
}  # fmt: skip


def _example(inputs: Callable[[Tokens], dict[str, Any]], **init: object) -> Example:
    return Example(
        "QwenImageTransformer2DModel", _TINY | init, inputs, {"_mod.": 4}, mask_input="encoder_hidden_states_mask"
    )


QWEN_IMAGE = ModelFamily(
    transformer_classes=("QwenImageTransformer2DModel",),
    pipelines=(
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageEditInpaintPipeline",
    ),
    refused_pipelines={
        "QwenImageLayeredPipeline": "it makes several layers of each picture, which answers do not hold"
    },
    sp_plan={
        "": {"controlnet_block_samples": SequenceParallelCompanion(split_dim=1, expected_dims=3)},
        "pos_embed": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "transformer_blocks.0": {
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "transformer_blocks.*": {
            "encoder_hidden_states_mask": SequenceParallelInput(split_dim=1, expected_dims=2),
            "modulate_index": SequenceParallelInput(split_dim=1, expected_dims=2),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    tp_plan={
        "transformer_blocks.*.attn.to_[qkv]": Colwise(),
        "transformer_blocks.*.attn.add_[qkv]_proj": Colwise(),
        "transformer_blocks.*.attn.to_out.0": Rowwise(),
        "transformer_blocks.*.attn.to_add_out": Rowwise(),
        "transformer_blocks.*.*_mlp.net.0.proj": Colwise(),
        "transformer_blocks.*.*_mlp.net.2": Rowwise(),
    },
    replacements=(
        FusedGelu(("transformer_blocks.*_mlp.net.0",)),
        RealRotation(
            "pos_embed",
            "image_rotary_emb",
            "QwenDoubleStreamAttnProcessor2_0",
            norms=(("norm_q", 0), ("norm_k", 0), ("norm_added_q", 1), ("norm_added_k", 1)),
        ),
        SharedModulation(
            "time_text_embed",
            ("transformer_blocks.*.img_mod", "transformer_blocks.*.txt_mod"),
            unless=("zero_cond_t", "use_additional_t_cond"),  # two timesteps; what kind of layer a picture is
        ),
    ),
    guidance_batch=GuidanceBatch("encoder_hidden_states", ("hidden_states", "timestep", "img_shapes")),
    examples={
        "qwen-image": _example(_inputs),
        "qwen-image edit": _example(_edit_inputs, zero_cond_t=True),
        "qwen-image control": _example(_control_inputs),
    },
)
