"""Turns a model's attention mask into the one for tokens that are divided among ranks.

In: a mask as the model made it, for this rank's tokens or for the whole sequence. Out: an additive `RankMask`. A mask
that is the same for all queries and heads becomes a key mask, which travels with its keys; only others become a bias,
which every rank holds whole. Called by `sp_core.attention.region_attention`.

Shapes: B batch, H heads, L tokens that this rank holds, S tokens of the whole sequence, its streams side by side.
"""

from dataclasses import dataclass

import torch

from sp_core import torch_private
from sp_core.token_layout import TokenLayout


@dataclass(frozen=True)
class RankMask:
    """A mask for attention across ranks. At most one of the two is set; both are additive.

    Attributes:
        key_mask: `(B or 1, L)`, this rank's share of a mask that is the same for all queries and heads.
        bias: `(B or 1, H or 1, S or 1, S)`, queries and keys in the order of the ranks, padding hidden.
    """

    key_mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def over_keys(key_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A key mask `(B, K)` in the shape that kernels take, `(B, 1, 1, K)`."""
    return None if key_mask is None else key_mask[:, None, None, :]


def mask_for_ranks(name: str, mask: torch.Tensor | None, layout: TokenLayout, query: torch.Tensor) -> RankMask:
    """The model's mask and the padding of the region, for attention across ranks.

    Args:
        name: the name of the attention, for messages.
        mask: boolean (True takes part) or additive; `(B, L)`, `(B, S)`, `(B, 1, 1, L)`, also
            expanded to heads and queries, or `(B, H or 1, S or 1, S)`.
        layout: which tokens each rank holds.
        query: gives dtype and device.

    Raises:
        ValueError: a mask of another kind or shape.
    """
    version = None if mask is None else torch_private.version(mask)
    prepared = layout.once_per_mask(mask, version, lambda: _for_ranks(name, mask, layout, query))
    assert isinstance(prepared, RankMask)
    return prepared


def _for_ranks(name: str, mask: torch.Tensor | None, layout: TokenLayout, query: torch.Tensor) -> RankMask:
    real = layout.real(query.device)
    if mask is None:
        return RankMask() if real is None else RankMask(key_mask=_additive(real[None], query.dtype))
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise ValueError(f"a mask must be boolean or floating (additive), got {mask.dtype}; convert it with .bool()")
    local, total = layout.local, layout.total
    given = mask.shape
    if mask.ndim == 4 and all(mask.shape[dim] == 1 or mask.stride(dim) == 0 for dim in (1, 2)):
        mask = mask[:, 0, 0]  # one row, maybe expanded to heads and queries
    mask = _additive(mask, query.dtype)
    if mask.shape[0] not in (1, query.shape[0]):
        raise ValueError(f"attention {name!r} has a mask of shape {tuple(given)} for a batch of {query.shape[0]}")
    if mask.ndim == 2 and mask.shape[1] == local:
        return RankMask(key_mask=mask if real is None else mask.masked_fill(~real, float("-inf")))
    if mask.ndim == 2 and mask.shape[1] == total:
        return RankMask(key_mask=_pick(mask, layout.own_order(query.device)))
    if mask.ndim == 4 and mask.shape[3] == total and mask.shape[2] in (1, total):
        order = layout.order(query.device)
        bias = _pick(mask, order)
        return RankMask(bias=bias if mask.shape[2] == 1 else bias.index_select(2, order.clamp(min=0)))
    raise ValueError(
        f"attention {name!r} has a mask of shape {tuple(given)}; this rank holds {local} of {total} tokens, so it "
        f"may be (B, {local}) or (B, 1, 1, {local}) for its own keys, or (B, {total}), (B, heads or 1, 1, {total}) or "
        f"(B, heads or 1, {total}, {total}) for all keys"
    )


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as one to add to the scores, -inf where it hides; an additive one in the scores' dtype."""
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _pick(mask: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The mask's columns in another order, -inf where the order has padding."""
    return mask.index_select(-1, order.clamp(min=0)).masked_fill(order < 0, float("-inf"))
