"""Ring attention: keys and values travel round the ranks, queries stay.

After Ring Attention (arXiv 2310.01889). Each rank attends to the chunk it holds while the next one is on its way, and
merges the results by their log-sum-exp in fp32. A rank holds two chunks at a time, however long the sequence is.
Called by `sp_core.attention.hybrid`.

Shapes: B batch, R tokens that every rank holds, L this rank's tokens, H query heads, K key heads, D head size, P ranks.
Chunks may differ in length. The keys of replicated tokens are attended to once, with the rank's own chunk, and do not
travel.
"""

import torch

from sp_core import collectives, kernels
from sp_core.attention.masks import RankMask, over_keys
from sp_core.token_layout import AxisLayout


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: RankMask,
    scale: float | None,
    layout: AxisLayout,
) -> torch.Tensor:
    """Attention of this rank's queries over all ranks' keys.

    Args:
        query: `(B, R + L, H, D)`, this rank's share.
        key: `(B, R + L, K, D)`; K divides H.
        value: as key.
        mask: the key mask is this rank's share, `(B, R + L)`; the bias is for this rank's queries over all keys, in the
            order of the ranks, broadcastable to `(B, H, R + L, R + sum of lengths)`.
        scale: of the scores; None is 1/sqrt(D).
        layout: the P ranks and their tokens.

    Returns:
        `(B, R + L, H, D)`, in the queries' dtype.
    """
    axis, lengths, replicated = layout.axis, layout.lengths, layout.replicated
    if axis.size == 1:
        return kernels.attention(query, key, value, over_keys(mask.key_mask) if mask.bias is None else mask.bias, scale)
    batch, _, key_heads, head_size = key.shape
    # Keys, values and key mask share one message, so a shift costs its latency once. Every rank has the whole bias.
    width = 2 * key_heads * head_size
    chunk = torch.cat((key.flatten(2), value.flatten(2)), dim=2)
    if mask.key_mask is not None:  # repeated 8 times: kernels want rows of a multiple of 16 bytes
        chunk = torch.cat((chunk, mask.key_mask.unsqueeze(2).expand(-1, -1, 8)), dim=2)  # (B, R + L, width + 8)

    merged: kernels.Partial | None = None
    for distance in range(axis.size):
        owner = (axis.rank - distance) % axis.size
        following = None
        if distance + 1 < axis.size:
            # Start the shift before the kernel: NCCL moves the next chunk on its own stream meanwhile. All ranks shift
            # at once, so each receives what its predecessor holds now, which is the chunk of the rank before `owner`.
            outgoing = chunk[:, replicated:] if distance == 0 else chunk
            received = (batch, lengths[(owner - 1) % axis.size], chunk.shape[2])
            following = collectives.RingShift(outgoing, received, axis)
        keys, values = chunk[..., :width].unflatten(2, (2, key_heads, head_size)).unbind(2)
        if mask.key_mask is not None:
            chunk_mask = over_keys(chunk[..., -1])
        else:
            chunk_mask = _columns_of(mask.bias, owner, layout, with_replicated=distance == 0)
        part = kernels.partial_attention(query, keys, values, chunk_mask, scale)
        merged = part if merged is None else kernels.merge(merged, part)
        if following is not None:
            chunk = following.wait()
    assert merged is not None
    return merged.output.to(query.dtype)


def _columns_of(
    bias: torch.Tensor | None, owner: int, layout: AxisLayout, *, with_replicated: bool
) -> torch.Tensor | None:
    """The columns of a bias for the keys of rank `owner`'s chunk."""
    if bias is None:
        return None
    first = layout.replicated + sum(layout.lengths[:owner])
    columns = bias.narrow(-1, first, layout.lengths[owner])
    return torch.cat((bias[..., : layout.replicated], columns), dim=-1) if with_replicated else columns
