"""Ulysses attention: trade sequence for heads, attend over the whole sequence, trade back.

After DeepSpeed-Ulysses (arXiv 2309.14509), with four changes: the shares of the ranks may differ in length; Q, K, V and
the key mask travel in one exchange; heads that the ranks do not divide are shared unevenly, the last ranks taking fewer
or none; and tokens that every rank holds do not travel on the way in. Called by `sp_core.attention.hybrid`.

Shapes: B batch, R replicated tokens, L this rank's tokens, S all ranks' tokens, H query heads, K key heads (H = G x K),
D head size, P ranks. Ranks hold arbitrary pieces of the sequence (text and image pieces side by side): attention
without a causal mask does not mind the order, as long as keys, values and mask share it.
"""

from collections.abc import Callable

import torch

from sp_core import collectives
from sp_core.degrees import head_shares
from sp_core.mesh import MeshAxis

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""q, k, v `(B, R + S, heads of this rank, D)` and an additive key mask `(B, R + S)` to an output like q."""


def ulysses_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    attend: Attend,
    lengths: list[int],
    replicated: int,
    axis: MeshAxis,
) -> torch.Tensor:
    """Attention of this rank's queries over all ranks' keys.

    Args:
        query: `(B, R + L, H, D)`, this rank's share.
        key: `(B, R + L, K, D)`; K divides H.
        value: as key.
        mask: this rank's share of an additive key mask, `(B, R + L)`.
        attend: attention over the whole sequence for a share of the heads.
        lengths: split tokens of each rank, `lengths[axis.rank] == L`.
        replicated: R, tokens in front that all ranks hold alike.
        axis: the P ranks.

    Returns:
        `(B, R + L, H, D)`.
    """
    if axis.size == 1:
        return attend(query, key, value, mask)
    group = query.shape[2] // key.shape[2]
    lanes = [*query.unflatten(2, (-1, group)).unbind(3), key, value]  # G + 2 of (B, R + L, K, D)
    shares = head_shares(key.shape[2], axis.size)
    mine = shares[axis.rank]
    first = sum(shares[: axis.rank])

    travelling = None if mask is None else mask[:, replicated:]
    whole, key_mask = _trade_heads_for_tokens(
        [lane[:, replicated:] for lane in lanes], travelling, shares, lengths, axis
    )
    if replicated:
        everywhere = torch.stack([lane[:, :replicated, first : first + mine] for lane in lanes])
        whole = torch.cat((everywhere, whole), dim=2)
        key_mask = None if mask is None or key_mask is None else torch.cat((mask[:, :replicated], key_mask), dim=1)

    whole_query = whole[0] if group == 1 else whole[:group].movedim(0, 3).flatten(2, 3)
    attended = attend(whole_query, whole[-2], whole[-1], key_mask) if mine else whole_query
    return _trade_back(attended, [share * group for share in shares], lengths, replicated, axis)


def _trade_heads_for_tokens(
    lanes: list[torch.Tensor],
    mask: torch.Tensor | None,
    shares: list[int],
    lengths: list[int],
    axis: MeshAxis,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Send each rank its heads of my tokens, `[lanes | mask]` in one message, packed in one pass so that each tensor is
    contiguous on arrival. `(lanes, B, S, heads, D)` and the mask `(B, S)` come in."""
    batch, local, _, head_size = lanes[0].shape
    per_head = len(lanes) * batch * head_size  # elements of a token, for each head
    per_mask = batch if mask is not None else 0
    sent = [local * (share * per_head + per_mask) for share in shares]
    packed = lanes[0].new_empty(sum(sent))
    equal = sum(share == shares[0] for share in shares)  # these messages are alike, so one copy fills them all
    heads = equal * shares[0]
    _pack(packed[: equal * sent[0]].view(equal, -1), [lane[:, :, :heads] for lane in lanes], shares[0], mask)
    for rank in range(equal, axis.size):
        message = packed[sum(sent[:rank]) : sum(sent[: rank + 1])].view(1, -1)
        behind = slice(heads, heads + shares[rank])
        _pack(message, [lane[:, :, behind] for lane in lanes], shares[rank], mask)
        heads += shares[rank]

    mine = shares[axis.rank]
    received = [length * (mine * per_head + per_mask) for length in lengths]
    messages = collectives.all_to_all(packed, sent, received, axis).split(received)
    parts = [
        message[: length * mine * per_head].view(len(lanes), batch, length, mine, head_size)
        for message, length in zip(messages, lengths, strict=True)
    ]
    whole = torch.cat(parts, dim=2)
    if mask is None:
        return whole, None
    ends = [message[-batch * length :].view(batch, length) for message, length in zip(messages, lengths, strict=True)]
    return whole, torch.cat(ends, dim=1)


def _pack(messages: torch.Tensor, lanes: list[torch.Tensor], share: int, mask: torch.Tensor | None) -> None:
    """Fill `messages` `(ranks, elements)`: to each rank the next `share` heads of all lanes, then the mask."""
    batch, local, _, head_size = lanes[0].shape
    elements = len(lanes) * batch * local * share * head_size
    if share:
        blocks = messages[:, :elements].unflatten(1, (len(lanes), batch, local, share, head_size))
        for i, lane in enumerate(lanes):
            blocks[:, i] = lane.unflatten(2, (-1, share)).movedim(2, 0)
    if mask is not None:
        messages[:, elements:] = mask.reshape(-1)


def _trade_back(
    attended: torch.Tensor, shares: list[int], lengths: list[int], replicated: int, axis: MeshAxis
) -> torch.Tensor:
    """Send each rank its tokens (and all replicated ones) of my heads. `(B, R + L, H, D)` comes in."""
    batch, _, mine, head_size = attended.shape
    everywhere, *parts = attended.split([replicated, *lengths], dim=1)
    if replicated:
        parts = [torch.cat((everywhere, part), dim=1) for part in parts]
    outgoing = torch.cat([part.reshape(-1) for part in parts])
    held = replicated + lengths[axis.rank]
    sent = [(replicated + length) * batch * mine * head_size for length in lengths]
    received = [held * batch * share * head_size for share in shares]
    returned = collectives.all_to_all(outgoing, sent, received, axis)
    if len(set(shares)) == 1:
        return returned.view(axis.size, batch, held, mine, head_size).movedim(0, 2).flatten(2, 3)
    by_rank = zip(returned.split(received), shares, strict=True)
    return torch.cat([message.view(batch, held, share, head_size) for message, share in by_rank], dim=2)
