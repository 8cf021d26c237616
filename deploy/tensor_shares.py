"""Which weights the ranks of a tensor-parallel group share out, and which stay wide, by name. For `deploy.memory`.

Loading itself asks the tensor plans of `sp_core.models` and the model classes, which bring torch; this is the same as
data, so that a deployment can be checked without it. `tests/deploy/test_memory.py` compares the two, byte by byte.
"""

from fnmatch import fnmatchcase

_SHARED = {
    "FluxTransformer2DModel": (
        "*.attn.to_[qkv].*",
        "*.attn.add_[qkv]_proj.*",
        "*.attn.to_out.0.weight",
        "*.attn.to_add_out.weight",
        "*.ff.net.0.proj.*",
        "*.ff.net.2.weight",
        "*.ff_context.net.0.proj.*",
        "*.ff_context.net.2.weight",
        "single_transformer_blocks.*.proj_mlp.*",
        "single_transformer_blocks.*.proj_out.weight",
    ),
    "QwenImageTransformer2DModel": (
        "*.attn.to_[qkv].*",
        "*.attn.add_[qkv]_proj.*",
        "*.attn.to_out.0.weight",
        "*.attn.to_add_out.weight",
        "*.img_mlp.net.0.proj.*",
        "*.img_mlp.net.2.weight",
        "*.txt_mlp.net.0.proj.*",
        "*.txt_mlp.net.2.weight",
    ),
    "WanTransformer3DModel": (
        "blocks.*.attn[12].to_[qkv].*",
        "blocks.*.attn[12].norm_[qk].weight",
        "blocks.*.attn[12].to_out.0.weight",
        "blocks.*.attn2.add_[kv]_proj.*",
        "blocks.*.attn2.norm_added_k.weight",
        "blocks.*.ffn.net.0.proj.*",
        "blocks.*.ffn.net.2.weight",
    ),
    "ZImageTransformer2DModel": (
        "*.attention.to_[qkv].*",
        "*.attention.to_out.0.weight",
        "*.feed_forward.w[13].*",
        "*.feed_forward.w2.weight",
    ),
}
"""Patterns of tensor names by transformer class. Layers that sum partial outputs keep their bias whole."""

_KEPT_WIDE = {
    ("WanTransformer3DModel", "bfloat16"): {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"},
    ("WanTransformer3DModel", "float16"): {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"},
    ("T5EncoderModel", "float16"): {"wo"},
    ("UMT5EncoderModel", "float16"): {"wo"},
}
"""Modules and parameters that stay in float32, by class and the dtype that all others are loaded in."""


def can_share(kind: str) -> bool:
    """Whether it is known what ranks share of a transformer class."""
    return kind in _SHARED


def is_shared(kind: str, tensor: str) -> bool:
    """Whether each rank of a tensor-parallel group holds only its part of a tensor.

    Args:
        kind: the transformer's class.
        tensor: its name in the weight files.
    """
    return any(fnmatchcase(tensor, pattern) for pattern in _SHARED.get(kind, ()))


def stays_wide(kind: str, tensor: str, dtype: str) -> bool:
    """Whether a tensor is loaded in float32 although the others of its class are loaded in `dtype`."""
    return not _KEPT_WIDE.get((kind, dtype), set()).isdisjoint(tensor.split("."))
