"""Attention of a running forward: across the sequence ranks inside a region, on this rank alone outside one.

The one way from a model's attention to `hybrid`, for diffusers' models (`diffusers_seam`) and for those written with
`SequenceParallelAttention` (`layer`). Under `torch.compile` it is one opaque operator, so a compiled block keeps one
graph, and what is split is looked up when it runs: new lengths need no new graph.
"""

import torch

from sp_core import collectives
from sp_core.attention.hybrid import sequence_parallel_attention
from sp_core.attention.masks import RankMask, mask_for_ranks
from sp_core.sp_sharding import SequenceShards
from sp_core.token_layout import TokenLayout


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
        ValueError: the tokens are not those of the region, or the mask fits neither them nor the whole sequence; on
            all ranks, if it happens at an attention's first call.
    """
    if torch.compiler.is_compiling():
        return compiled_attention(query, key, value, mask, scale, shards.number, stream, joint)
    misfit: ValueError | None = None
    for_ranks = RankMask()
    try:
        layout = _layout(query, key, value, shards, name, stream, joint)
        if layout is not None:
            for_ranks = mask_for_ranks(name, mask, layout, query)
    except ValueError as error:
        misfit = error
    _agree(misfit, shards, f"{name}/{stream}/{joint > 0}")
    if layout is None:
        return shards.local_attention(query, key, value, mask, scale)
    shards.attended = True
    return sequence_parallel_attention(query, key, value, for_ranks, scale, layout, shards.mesh)


def compiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    record: int,
    stream: str = "",
    joint: int = 0,
) -> torch.Tensor:
    """`region_attention` while torch.compile traces; `record` is the number of the `SequenceShards`."""
    return _attention_operator(query, key, value, mask, scale, record, stream, joint)  # type: ignore[no-any-return]


def _layout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shards: SequenceShards,
    name: str,
    stream: str,
    joint: int,
) -> TokenLayout | None:
    """The tokens of an attention across ranks; None for one that is local."""
    layout = shards.layout(stream, joint)
    if shards.mesh.axis("sequence").size == 1:
        return None
    if layout is None:
        before = shards.layout(stream, joint, gathered=True) if shards.gathered else None
        if before is not None and query.shape[1] == before.local != before.total:
            raise ValueError(
                f"attention {name!r} is over {query.shape[1]} tokens, as many as this rank's share of what has been "
                "gathered already, and would be local; gather behind it, or with sp_gather(..., closes=False), or say "
                "SequenceParallelAttention(local=True) where these tokens are whole"
            )
        return None
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
    return layout


def _agree(misfit: ValueError | None, shards: SequenceShards, name: str) -> None:
    """Raise if the attention does not fit. At its first call all ranks learn whether it fits on each of them: a wrong
    plan may fit on some by chance, and these would wait for the others in an exchange that never comes."""
    if name not in shards.agreed:
        shards.agreed.add(name)
        somewhere = collectives.on_any_rank(misfit is not None, shards.mesh.axis("sequence"))
        if somewhere and misfit is None:
            raise ValueError(f"attention {name.partition('/')[0]!r} does not fit the plan on another rank; see there")
    if misfit is not None:
        raise misfit


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
