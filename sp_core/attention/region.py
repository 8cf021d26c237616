"""Attention of a running forward: across the sequence ranks inside a region, on this rank alone outside one.

The one way from a model's attention to `hybrid`, for diffusers' models (`diffusers_seam`) and for those written with
`SequenceParallelAttention` (`layer`). Under `torch.compile` it is one opaque operator, so a compiled block keeps one
graph, and what is split is looked up when it runs: new lengths need no new graph.
"""

import torch

from sp_core.attention.hybrid import sequence_parallel_attention
from sp_core.attention.masks import mask_for_ranks
from sp_core.sp_sharding import SequenceShards


def region_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    shards: SequenceShards,
    *,
    name: str = "",
    stream: str = "",
    joint: int = 0,
) -> torch.Tensor:
    """Attention of this rank's queries.

    Args:
        query: `(B, L, H, D)`.
        key: `(B, L, K, D)`; K divides H.
        value: as key.
        mask: see `sp_core.attention.masks`.
        scale: of the scores; None is 1/sqrt(D).
        shards: what is split in the running forward.
        name: the attention, for messages.
        stream: the parameter name of the only stream that this attention sees; empty: it joins all.
        joint: tokens in front that are whole on every rank, besides those of the region.

    Returns:
        `(B, L, H, D)`.

    Raises:
        ValueError: the tokens are not those of the region, or the mask fits neither them nor the whole sequence.
    """
    if torch.compiler.is_compiling():
        attended: torch.Tensor = _attention_operator(query, key, value, mask, scale, shards.number, stream, joint)
        return attended
    layout = shards.layout(stream, joint)
    if layout is None or len(layout.lengths) == 1:
        return shards.local_attention(query, key, value, mask, scale)
    if not query.shape[1] == key.shape[1] == layout.local:
        raise ValueError(
            f"attention {name!r} has {query.shape[1]} queries and {key.shape[1]} keys on sequence rank "
            f"{layout.rank}, but the streams split before it ({shards.streams}) leave {layout.local} tokens there; a "
            "split is missing from the plan, stands at the wrong module, or one of these is no token stream (a 3-D "
            "floating tensor that is split counts as one, unless its entry is a SequenceParallelCompanion)"
        )
    if query.shape[2] % key.shape[2] or key.shape != value.shape:
        raise ValueError(
            f"attention {name!r} has {query.shape[2]} query heads, keys {tuple(key.shape)} and values "
            f"{tuple(value.shape)}; keys and values must be alike, and their heads divide the queries'"
        )
    shards.attended = True
    for_ranks = mask_for_ranks(name, mask, layout, query)
    return sequence_parallel_attention(query, key, value, for_ranks, scale, layout, shards.mesh)


@torch.library.custom_op("sp_core::attention", mutates_args=())
def _attention_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    record: int,
    stream: str,
    joint: int,
) -> torch.Tensor:
    shards = SequenceShards.numbered(record)
    return region_attention(query, key, value, mask, scale, shards, stream=stream, joint=joint).contiguous()


@_attention_operator.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    record: int,
    stream: str,
    joint: int,
) -> torch.Tensor:
    return query.new_empty(query.shape)
