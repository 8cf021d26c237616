"""Attention of a running forward: across the sequence ranks inside a region, on this rank alone outside one.

This is the only way from a model's attention to `hybrid`, both for diffusers' models (`diffusers_backend`) and for
models with `SequenceParallelAttention` (`layer`). Under `torch.compile` it is one opaque operator: a compiled block
keeps one graph, and the region is looked up when the graph runs, so new lengths need no new graph.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from sp_core import kernels
from sp_core.attention.hybrid import sequence_parallel_attention
from sp_core.attention.masks import RankMask, mask_for_ranks
from sp_core.region import Region, SequenceContext
from sp_core.token_layout import TokenLayout

_kept_local = False


@contextmanager
def attention_kept_local() -> Iterator[None]:
    """The negative control of every proof: inside, each rank attends only to its own tokens, with its part of the mask.

    It holds for the whole process, so a test can use it beside a running model. If the answer stays the same inside, it
    proves nothing about attention across ranks.
    """
    global _kept_local
    before, _kept_local = _kept_local, True
    try:
        yield
    finally:
        _kept_local = before


def is_kept_local() -> bool:
    """Whether `attention_kept_local` is active."""
    return _kept_local


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a parallelized model.

    Attributes:
        context: the context of the model.
        name: the module's dotted name, for messages.
        stream: the names of the streams that it joins, see `Region.layout`; empty: all.
        keys_of: the stream of its keys, if its queries come from another one.
        keys_in_front: whether its keys begin with tokens that every rank has whole and that are no queries.
        masks_queries: whether its mask hides queries as well as keys, `(B, 1, L, L)` of this rank's tokens.
    """

    context: SequenceContext
    name: str = ""
    stream: str = ""
    keys_of: str = ""
    keys_in_front: bool = False
    masks_queries: bool = False


def region_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    site: AttentionSite,
    joint: int = 0,
    length_base: float = 0.0,
) -> torch.Tensor:
    """Attention of this rank's queries.

    Args:
        query: `(B, L, H, D)`.
        key: `(B, L, K, D)`; K divides H.
        value: as key.
        mask: see `sp_core.attention.masks`.
        scale: of the scores; None is 1/sqrt(D).
        site: which attention this is.
        joint: tokens in front that every rank has whole, besides those of the region.
        length_base: the scale is multiplied by the root of the logarithm, to this base, of the number of all tokens; 0:
            it is not.

    Returns:
        `(B, L, H, D)`.

    Raises:
        ValueError: the tokens are not those of the region, or the mask fits neither them nor the whole sequence; on
            all ranks, if it happens at an attention's first call.
    """
    if site.keys_of and not torch.compiler.is_compiling():
        return _attention_to_another(query, key, value, mask, scale, site)
    if site.masks_queries and mask is not None:
        mask = mask[:, 0].any(dim=1)
    if site.keys_in_front:
        front = key.shape[1] - query.shape[1]
        query = pad(query, (0, 0, 0, 0, front, 0))
        return region_attention(
            query, key, value, mask, scale, replace(site, keys_in_front=False, masks_queries=False), front, length_base
        )[:, front:]
    context = site.context
    if torch.compiler.is_compiling():
        return _attention_operator(  # type: ignore[no-any-return]
            query, key, value, mask, scale, context.number, site.stream, site.keys_of, joint, length_base
        )
    forward = context.running()
    layout: TokenLayout | None = None
    trimmed: TokenLayout | None = None
    rank_mask = RankMask()
    misfit: ValueError | None = None
    try:
        if forward is not None:
            layout = layout_of(forward.region, query, key, value, site, joint)
        if layout is not None:
            trimmed = layout.trimmed() if mask is None and layout.has_padding else None
            rank_mask = RankMask() if trimmed else mask_for_ranks(site.name, mask, layout, query)
    except ValueError as error:
        misfit = error
    context.agree(f"attention {site.name!r}", f"{site.name}/{site.stream}/{joint > 0}", misfit)
    if length_base:
        tokens = query.shape[1] if layout is None else layout.total
        scale = (query.shape[-1] ** -0.5 if scale is None else scale) * math.sqrt(math.log(tokens, length_base))
    if forward is None or layout is None:
        return context.local_attention(query, key, value, mask, scale)
    forward.record_attention()
    if trimmed is not None:  # a mask over the whole sequence, for the padding of a short text, costs the fast kernel
        query, key, value = (layout.trim(tensor) for tensor in (query, key, value))
        if _kept_local:
            return layout.untrim(kernels.local_attention(query, key, value, None, scale))
        return layout.untrim(sequence_parallel_attention(query, key, value, rank_mask, scale, trimmed, context.mesh))
    if _kept_local:
        return kernels.local_attention(query, key, value, rank_mask.key_mask, scale)
    return sequence_parallel_attention(query, key, value, rank_mask, scale, layout, context.mesh)


def _attention_to_another(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    site: AttentionSite,
) -> torch.Tensor:
    """Attention to the tokens of another stream. This rank has its share of them and of the mask.

    The other stream is a text, much shorter than the stream of the queries: its keys are gathered, and no query moves.
    """
    forward = site.context.running()
    if forward is not None and forward.region.layout(site.keys_of) is not None:
        both = forward.gather(torch.cat((key, value), -1), 1, site.keys_of, closes=False)
        key, value = both.split([key.shape[-1], value.shape[-1]], -1)
        if mask is not None:
            as_bytes = mask.byte() if mask.dtype is torch.bool else mask  # gloo gathers no booleans
            mask = forward.gather(as_bytes, 3, site.keys_of, closes=False).to(mask.dtype)
    return site.context.local_attention(query, key, value, mask, scale)


def layout_of(
    region: Region, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, site: AttentionSite, joint: int = 0
) -> TokenLayout | None:
    """The tokens of an attention across ranks; None for one that is local.

    Raises:
        ValueError: the tokens are not those of the region.
    """
    layout = region.layout(site.stream, joint)
    if site.context.mesh.axis("sequence").size == 1:
        return None
    if layout is None:
        before = region.layout(site.stream, joint, gathered=True) if region.is_closing else None
        if before is not None and query.shape[1] == before.local != before.total:
            raise ValueError(
                f"attention {site.name!r} is over {query.shape[1]} tokens, as many as this rank's share of what has "
                "been gathered already, and would be local; gather after it, or with sp_gather(..., closes=False), or "
                "say SequenceParallelAttention(local=True) where these tokens are whole"
            )
        return None
    if not query.shape[1] == key.shape[1] == layout.local:
        raise ValueError(
            f"attention {site.name!r} has {query.shape[1]} queries and {key.shape[1]} keys on sequence rank "
            f"{layout.rank}, but the streams split before it ({region.streams}) leave {layout.local} tokens there; a "
            "split is missing from the plan, stands at the wrong module, or one of these is not a token stream (a 3-D "
            "floating tensor that is split counts as one, unless its entry is a SequenceParallelCompanion)"
        )
    if query.shape[2] % key.shape[2] or key.shape != value.shape:
        raise ValueError(
            f"attention {site.name!r} has {query.shape[2]} query heads, keys {tuple(key.shape)} and values "
            f"{tuple(value.shape)}; keys and values must be alike, and their heads divide the queries'"
        )
    return layout


@torch.library.custom_op("sp_core::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attention_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    number: int,
    stream: str,
    keys_of: str,
    joint: int,
    length_base: float,
) -> torch.Tensor:
    site = AttentionSite(SequenceContext.numbered(number), stream=stream, keys_of=keys_of)
    return region_attention(query, key, value, mask, scale, site, joint, length_base).contiguous()


@_attention_operator.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    number: int,
    stream: str,
    keys_of: str,
    joint: int,
    length_base: float,
) -> torch.Tensor:
    return query.new_empty(query.shape)
