"""The seam: attention calls of diffusers' models come here while a model is parallelised.

diffusers sends every attention through a table of backends and passes along the `_parallel_config` of the calling
processor. This file puts one entry into the table and one `BoundAttention` into each processor. Calls that carry
something else (models that are not ours, Wan's cross-attention) go on to the backend that was active before.

All of diffusers' private names that sp_core relies on are used here and nowhere else; `tests/test_sp_core.py`
fails when a new release moves them.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from sp_core.attention.hybrid import sequence_parallel_attention
from sp_core.sp_sharding import SequenceShards


class _Backend(StrEnum):
    SEQUENCE_PARALLEL = "sp_core"


class BoundAttention:
    """Attention of one module, across the sequence ranks inside a region and local outside one.

    Args:
        name: the module's dotted name, for messages.
        shards: the model's record of what is split.
    """

    def __init__(self, name: str, shards: SequenceShards) -> None:
        self.name = name
        self.shards = shards

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        """`(B, L, H, D)` for this rank's queries; options as diffusers' backends take them.

        Raises:
            ValueError: the tokens are not those of the region, or an option that cannot be honoured across ranks.
        """
        lengths = self.shards.local_lengths()
        axis = self.shards.mesh.axis("sequence")
        if not lengths or axis.size == 1:
            return _local(query, key, value, **options)
        if not query.shape[1] == key.shape[1] == lengths[axis.rank]:
            raise ValueError(
                f"attention {self.name!r} has {query.shape[1]} queries and {key.shape[1]} keys on sequence rank "
                f"{axis.rank}, but the streams split before it ({self.shards.streams}) leave "
                f"{lengths[axis.rank]} tokens there; a split is missing from the plan, stands at the wrong module, or "
                "one of these is no token stream (every 3-D floating tensor that is split counts as one)"
            )
        if options.get("is_causal") or options.get("dropout_p") or options.get("enable_gqa"):
            raise ValueError(
                f"attention {self.name!r} asks for is_causal, dropout or grouped heads, "
                "which sequence parallelism does not support yet"
            )
        self.shards.attended = True
        mesh = self.shards.mesh
        if query.shape[2] % mesh.degrees.ulysses_degree:
            raise ValueError(
                f"attention {self.name!r}: ulysses_degree={mesh.degrees.ulysses_degree} does not divide its "
                f"{query.shape[2]} heads; use ring_degree instead"
            )
        mask = _key_mask(self.name, options.get("attn_mask"), self.shards.padding_mask(query.device))
        return sequence_parallel_attention(query, key, value, mask, options.get("scale"), lengths, mesh)


def bind_attention(model: nn.Module, shards: SequenceShards) -> Callable[[], None]:
    """Bring the attention of all of the model's processors here.

    Returns:
        The function that lets them go again.

    Raises:
        ValueError: a processor's attention would stay local without a word, or the model is parallelised already.
    """
    found = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    deaf = {name: type(p).__name__ for name, p in found.items() if not hasattr(p, "_parallel_config")}
    if deaf or not found:
        culprits = ", ".join(f"{name} ({processor})" for name, processor in deaf.items()) or "none was found"
        raise ValueError(
            f"{type(model).__name__} cannot be parallelised: attention processors that do not go through diffusers' "
            f"dispatch would attend only to their own rank's tokens: {culprits}"
        )
    for name, processor in found.items():
        if processor._parallel_config is not None:
            raise ValueError(f"{type(model).__name__} is parallelised already ({name}); remove() that first")
        if processor._attention_backend is not None:
            raise ValueError(
                f"{name} has its own attention backend ({processor._attention_backend}), which would attend only to "
                "its own rank's tokens; call reset_attention_backend() on the model first"
            )
    if _AttentionBackendRegistry.get_active_backend()[1] is not _dispatch:
        _take_over()
    for name, processor in found.items():
        processor._parallel_config = BoundAttention(name, shards)
    shards.expects_attention = True

    def release() -> None:
        for processor in found.values():
            vars(processor).pop("_parallel_config", None)  # the class's own None shows again

    return release


_previous: Any = None


def _take_over() -> None:
    """Make our entry the active one of diffusers' table, and remember the one before it for local attention.

    It stays when the last model lets go: it only forwards then, and another owner may have been put on top of it.
    """
    global _previous
    _previous = _AttentionBackendRegistry.get_active_backend()[0]
    _AttentionBackendRegistry.register(_Backend.SEQUENCE_PARALLEL, constraints=[])(_dispatch)
    _AttentionBackendRegistry.set_active_backend(_Backend.SEQUENCE_PARALLEL)


def _local(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """Attention on this rank alone, by the backend that diffusers would have used without us."""
    accepted = _AttentionBackendRegistry._supported_arg_names[_previous]
    known = {name: option for name, option in options.items() if name in accepted}
    attended: torch.Tensor = _AttentionBackendRegistry._backends[_previous](query, key, value, **known)
    return attended


def _dispatch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    options = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    if isinstance(_parallel_config, BoundAttention):
        return _parallel_config(query, key, value, **options)
    return _local(query, key, value, return_lse=return_lse, _parallel_config=_parallel_config, **options)


def _key_mask(name: str, mask: torch.Tensor | None, real: torch.Tensor | None) -> torch.Tensor | None:
    """One `(B, L)` key mask from the processor's, `(B, L)` or `(B, 1, 1, L)`, and the `(L,)` mask of real tokens."""
    if mask is not None and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1:
        mask = mask[:, 0, 0, :]
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"attention {name!r} has a mask of shape {tuple(mask.shape)}; across ranks only key masks, "
            "(B, keys) or (B, 1, 1, keys), are supported yet"
        )
    if mask is None or real is None:
        return mask if real is None else real[None]
    return mask & real if mask.dtype is torch.bool else mask.masked_fill(~real, float("-inf"))
