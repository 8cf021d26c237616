"""Ring attention: keys and values travel round the ranks, queries stay.

After Ring Attention (arXiv 2310.01889). Each rank attends to the chunk it holds while the next one is on its way, and
merges the results by their log-sum-exp in fp32. A rank holds two chunks at a time, whatever the length of the sequence.
Called by `sp_core.attention.hybrid`.

Shapes: B batch, R tokens that every rank holds, L this rank's tokens, H query heads, K key heads, D head size, P ranks.
Chunks may differ in length. The replicated tokens' keys are attended to once, with the rank's own chunk, and do not
travel.
"""

import torch

from sp_core import collectives, kernels
from sp_core.mesh import MeshAxis


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float | None,
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
        bias: an additive mask for this rank's queries over all keys, in the order of the ranks, broadcastable to
            `(B, H, R + L, R + sum(lengths))`.
        scale: of the scores; None is 1/sqrt(D).
        lengths: split tokens of each rank, `lengths[axis.rank] == L`.
        replicated: R.
        axis: the P ranks.

    Returns:
        `(B, R + L, H, D)`, in the queries' dtype.
    """
    if axis.size == 1:
        return kernels.attention(query, key, value, _over_keys(mask) if bias is None else bias, scale)
    batch, _, key_heads, head_size = key.shape
    width = 2 * key_heads * head_size
    chunk = torch.cat((key.flatten(2), value.flatten(2)), dim=2)
    if mask is not None:  # kernels want rows of a multiple of 16 bytes
        chunk = torch.cat((chunk, mask.unsqueeze(2).expand(-1, -1, 8)), dim=2)  # (B, R + L, width + 8)
    shared, columns = (None, bias) if bias is None else bias.split([replicated, sum(lengths)], dim=-1)

    merged: kernels.Partial | None = None
    for distance in range(axis.size):
        owner = (axis.rank - distance) % axis.size
        following = None
        if distance + 1 < axis.size:
            behind = (owner - 1) % axis.size
            outgoing = chunk[:, replicated:] if distance == 0 else chunk
            following = collectives.RingShift(outgoing, (batch, lengths[behind], chunk.shape[2]), axis)
        keys, values = chunk[..., :width].unflatten(2, (2, key_heads, head_size)).unbind(2)
        chunk_mask = _over_keys(chunk[..., -1]) if mask is not None else None
        if columns is not None and shared is not None:
            chunk_mask = columns.narrow(-1, sum(lengths[:owner]), lengths[owner])
            if distance == 0:
                chunk_mask = torch.cat((shared, chunk_mask), dim=-1)
        part = kernels.partial_attention(query, keys, values, chunk_mask, scale)
        merged = part if merged is None else kernels.merge(merged, part)
        if following is not None:
            chunk = following.wait()
    assert merged is not None
    return merged.output.to(query.dtype)


def _over_keys(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask[:, None, None, :]
