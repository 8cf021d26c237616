"""Z-Image: image and caption are refined separately, then joined into one sequence.

Peculiarities:
- Patchifying, padding and joining are methods of the model, not modules. But each of the three stacks of layers takes
  whole tensors, so each is a region of its own: split at its first layer, gathered after its last.
- The layers get rotations and masks again, hence the `*` entries; they are cheap views.
- Image and caption are each padded to a multiple of 32 with learned tokens that take part in attention. Only batches of
  unequal length have a mask, which may hide a rank's whole chunk for a row.
- ControlNet residuals are a dict by the number of the layer behind which they are added, as long as image and caption
  with their padding. Behind the last layer the sequence is whole again, so that no residual can be added there.
- 30 heads divide by Ulysses degrees 2, 3, 5 and 6; for 4 and 8 ranks add a ring.
"""

from typing import Any

from sp_core.models.family import Example, GuidanceBatch, ModelFamily, RealRotation, SharedModulation, Tokens
from sp_core.sp_plan import (
    SequenceParallelCompanion,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)
from sp_core.tp_plan import Colwise, Heads, Rowwise


def _stack(name: str) -> SequenceParallelModelPlan:
    return {
        f"{name}.0": {"x": SequenceParallelInput(split_dim=1, expected_dims=3)},
        f"{name}.*": {
            "freqs_cis": SequenceParallelInput(split_dim=1),  # complex (B, S, D), or real pairs (B, S, D, 2)
            "attn_mask": SequenceParallelInput(split_dim=1, expected_dims=2),
            "noise_mask": SequenceParallelInput(split_dim=1, expected_dims=2),
        },
        f"{name}.-1": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    }


def _inputs(tokens: Tokens) -> dict[str, Any]:
    """Captions of unequal length where a mask is asked for: a rank's whole chunk may then be hidden for a row."""
    captions = [5, 40][: tokens.batch] if tokens.mask == "per row" else [20] * tokens.batch
    return {
        "x": [tokens.normal(4, 1, 2 * tokens.height, 2 * tokens.width, seed=i) for i in range(tokens.batch)],
        "t": tokens.full(0.5, tokens.batch),
        "cap_feats": [tokens.normal(length, 16, seed=length + i) for i, length in enumerate(captions)],
    }


def _control_inputs(tokens: Tokens) -> dict[str, Any]:
    """A residual behind the first layer, as long as image and caption with their padding."""
    length = sum(-(-count // 32) * 32 for count in (tokens.height * tokens.width, 20))
    return _inputs(tokens) | {"controlnet_block_samples": {0: tokens.normal(tokens.batch, length, 96, seed=10)}}


_TINY = {
    "in_channels": 4, "dim": 96, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 6, "n_kv_heads": 6,
    "cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [256, 64, 64],
}  # fmt: skip

Z_IMAGE = ModelFamily(
    transformer_classes=("ZImageTransformer2DModel",),
    pipelines=(
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
    ),
    refused_pipelines={"ZImageOmniPipeline": "it encodes pictures in bfloat16, whatever its VAE is loaded in"},
    sp_plan={
        "": {"controlnet_block_samples": SequenceParallelCompanion(split_dim=1, expected_dims=3)},
        **_stack("noise_refiner"),
        **_stack("context_refiner"),
        **_stack("layers"),
    },
    tp_plan={
        "*.attention": Heads(),
        "*.attention.to_[qkv]": Colwise(),
        "*.attention.to_out.0": Rowwise(),
        "*.feed_forward.w[13]": Colwise(),
        "*.feed_forward.w2": Rowwise(),
    },
    replacements=(
        RealRotation("rope_embedder", "freqs_cis", "ZSingleStreamAttnProcessor", norms=(("norm_q", 0), ("norm_k", 0))),
        SharedModulation("t_embedder", ("*.adaLN_modulation",), across_ranks=False),  # of 256 features: soon read
    ),
    guidance_batch=GuidanceBatch("cap_feats", ("x", "t"), pads_to=32),
    examples={
        "z-image": Example(
            "ZImageTransformer2DModel",
            _TINY,
            _inputs,
            own_masks=("per row",),
            no_mask="only batches of captions of unequal length have a mask",
            no_length={"short": "the model pads image and caption to multiples of 32"},
        ),
        "z-image control": Example(
            "ZImageTransformer2DModel",
            _TINY,
            _control_inputs,
            no_mask="masks are proved without residuals",
            no_length={"short": "the model pads image and caption to multiples of 32"},
        ),
    },
)
