"""Ulysses attention: trade sequence for heads, attend over the whole sequence, trade back.

After DeepSpeed-Ulysses (arXiv 2309.14509), with four changes: the ranks' shares may differ in length; Q, K, V and the
key mask travel in one exchange; a number of heads that the ranks do not divide is shared unevenly, the last ranks take
fewer or none; and tokens that every rank holds do not travel on the way in. Called by `sp_core.attention.hybrid`.

Shapes: B batch, R replicated tokens, L this rank's tokens, S all ranks' tokens, H query heads, K key heads (H = G x K),
D head size, P ranks. Ranks hold arbitrary pieces of the sequence (text and image pieces side by side): attention
without a causal mask does not depend on the order, as long as keys, values and mask share it.
"""

from collections.abc import Callable

import torch

from sp_core import collectives
from sp_core.degrees import head_shares
from sp_core.token_layout import AxisLayout

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Takes q, k, v `(B, R + S, heads of this rank, D)` and an additive key mask `(B, R + S)`; returns an output like q."""


def ulysses_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    attend: Attend,
    layout: AxisLayout,
) -> torch.Tensor:
    """Attention of this rank's queries over all ranks' keys.

    Args:
        query: `(B, R + L, H, D)`, this rank's share.
        key: `(B, R + L, K, D)`; K divides H.
        value: as key.
        key_mask: this rank's share of an additive key mask, `(B, R + L)`.
        attend: attention over the whole sequence for a share of the heads.
        layout: the P ranks and their tokens.

    Returns:
        `(B, R + L, H, D)`.
    """
    axis, replicated = layout.axis, layout.replicated
    if axis.size == 1:
        return attend(query, key, value, key_mask)
    # The G query heads of a key head travel as G lanes beside it, so that a rank gets whole groups of heads.
    group = query.shape[2] // key.shape[2]
    lanes = [*query.unflatten(2, (-1, group)).unbind(3), key, value]  # G + 2 of (B, R + L, K, D)
    shares = head_shares(key.shape[2], axis.size)
    mine, first = shares[axis.rank], sum(shares[: axis.rank])

    split_lanes = [lane[:, replicated:] for lane in lanes]
    split_mask = None if key_mask is None else key_mask[:, replicated:]
    whole, whole_mask = _trade_heads_for_tokens(split_lanes, split_mask, shares, layout)
    if replicated:  # every rank has these tokens with all heads, and only picks its own
        everywhere = [lane[:, :replicated, first : first + mine] for lane in lanes]
        whole = [torch.cat(pair, dim=1) for pair in zip(everywhere, whole, strict=True)]
        if key_mask is not None and whole_mask is not None:
            whole_mask = torch.cat((key_mask[:, :replicated], whole_mask), dim=1)

    whole_query = whole[0] if group == 1 else torch.stack(whole[:group], dim=3).flatten(2, 3)
    # A rank without heads computes nothing, but takes part in the exchange back: all ranks enter the same collectives.
    attended = attend(whole_query, whole[-2], whole[-1], whole_mask) if mine else whole_query
    return _trade_back(attended, [share * group for share in shares], layout)


def _trade_heads_for_tokens(
    lanes: list[torch.Tensor], key_mask: torch.Tensor | None, shares: list[int], layout: AxisLayout
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Send each rank its heads of this rank's tokens, `(B, L, K, D)`.

    Each token is one row `[lanes | mask]`. The messages one after another are then the rows of the whole sequence, so
    nothing is copied on arrival.

    Returns:
        The lanes `(B, S, heads of this rank, D)`, views of the rows, and the key mask `(B, S)`.
    """
    axis, lengths = layout.axis, layout.lengths
    batch, local, _, head_size = lanes[0].shape
    per_head = len(lanes) * batch * head_size
    masks = 0 if key_mask is None else -(-batch // 8) * 8  # kernels want rows of a multiple of 16 bytes
    sent = [local * (share * per_head + masks) for share in shares]
    packed = lanes[0].new_empty(sum(sent))
    equal = sum(share == shares[0] for share in shares)  # these messages have one size: one copy a lane fills them all
    heads = equal * shares[0]
    _pack(packed[: equal * sent[0]].view(equal, local, -1), [lane[:, :, :heads] for lane in lanes], shares[0], key_mask)
    for rank in range(equal, axis.size):
        message = packed[sum(sent[:rank]) : sum(sent[: rank + 1])].view(1, local, -1) if sent[rank] else None
        if message is not None:
            _pack(message, [lane[:, :, heads : heads + shares[rank]] for lane in lanes], shares[rank], key_mask)
        heads += shares[rank]

    mine = shares[axis.rank]
    row = mine * per_head + masks
    received = [length * row for length in lengths]
    rows = collectives.all_to_all(packed, sent, received, axis).view(sum(lengths), row)
    whole = rows[:, : mine * per_head].unflatten(1, (len(lanes), batch, mine, head_size)).movedim(2, 0)
    return list(whole.unbind(2)), None if key_mask is None else rows[:, mine * per_head :][:, :batch].t()


def _pack(messages: torch.Tensor, lanes: list[torch.Tensor], share: int, key_mask: torch.Tensor | None) -> None:
    """Fill `messages` `(ranks, L, elements)`: to each rank the next `share` heads of all lanes, then the key mask."""
    batch, _, _, head_size = lanes[0].shape
    elements = len(lanes) * batch * share * head_size
    if share:
        rows = messages[:, :, :elements].unflatten(2, (len(lanes), batch, share, head_size))
        for i, lane in enumerate(lanes):
            rows[:, :, i] = lane.unflatten(2, (-1, share)).permute(2, 1, 0, 3, 4)
    if key_mask is not None:
        messages[:, :, elements : elements + batch] = key_mask.t()


def _trade_back(attended: torch.Tensor, shares: list[int], layout: AxisLayout) -> torch.Tensor:
    """Send each rank its tokens, and all replicated ones, of this rank's heads.

    Args:
        attended: `(B, R + S, heads of this rank, D)`.
        shares: query heads of each rank.
        layout: the ranks and their tokens.

    Returns:
        `(B, R + L, H, D)`.
    """
    axis, lengths, replicated = layout.axis, layout.lengths, layout.replicated
    batch, _, mine, head_size = attended.shape
    rows = attended.transpose(0, 1)
    if replicated:
        everywhere, *parts = rows.split([replicated, *lengths])
        rows = torch.cat([piece for part in parts for piece in (everywhere, part)])
    held = replicated + lengths[axis.rank]
    sent = [(replicated + length) * batch * mine * head_size for length in lengths]
    received = [held * batch * share * head_size for share in shares]
    returned = collectives.all_to_all(rows.reshape(-1), sent, received, axis)
    if len(set(shares)) == 1:
        return returned.view(axis.size, held, batch, mine, head_size).permute(2, 1, 0, 3, 4).flatten(2, 3)
    by_rank = zip(returned.split(received), shares, strict=True)
    return torch.cat([message.view(held, batch, share, head_size) for message, share in by_rank], dim=2).transpose(0, 1)
