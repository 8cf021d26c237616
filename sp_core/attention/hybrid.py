"""Ulysses inside, ring outside: attention over all sequence ranks of a mesh. Either axis may have size 1.

The ranks of a Ulysses group trade sequence for heads; each then holds one chunk of the sequence for its share of the
heads, and the ring carries those chunks. After USP (arXiv 2405.07719). Ulysses is the inner one because its exchanges
block, so its ranks should be neighbors; shifts of the ring run while kernels compute.

Called by `sp_core.attention.region_attention`.

Shapes: B batch, R tokens that every rank holds, L this rank's tokens, H query heads, K key heads, D head size.
"""

import torch

from sp_core.attention.masks import RankMask
from sp_core.attention.ring import ring_attention
from sp_core.attention.ulysses import ulysses_attention
from sp_core.degrees import head_shares
from sp_core.mesh import MeshAxis, ParallelMesh
from sp_core.token_layout import AxisLayout, TokenLayout


def sequence_parallel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: RankMask,
    scale: float | None,
    layout: TokenLayout,
    mesh: ParallelMesh,
) -> torch.Tensor:
    """Attention of this rank's queries over the keys of all sequence ranks.

    Args:
        query: `(B, R + L, H, D)`, this rank's share.
        key: `(B, R + L, K, D)`; K divides H, and each key head serves H / K consecutive query heads.
        value: as key.
        mask: this rank's mask.
        scale: of the scores; None is 1/sqrt(D).
        layout: which tokens each sequence rank holds.
        mesh: the ranks.

    Returns:
        `(B, R + L, H, D)`.
    """
    in_group, on_ring = layout.over(mesh)
    repeats = _key_repeats(query.shape[2], key.shape[2], in_group.axis.size)
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    bias = _own_part(mask.bias, query.shape[2], key.shape[2], in_group.axis, on_ring)
    # Every Ulysses rank holds the whole bias already; only the key mask has to travel with its keys.
    key_mask = None if mask.key_mask is None else mask.key_mask.expand(query.shape[:2])

    def over_the_ring(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None
    ) -> torch.Tensor:
        return ring_attention(query, key, value, RankMask(key_mask, bias), scale, on_ring)

    return ulysses_attention(query, key, value, key_mask, over_the_ring, in_group)


def _key_repeats(heads: int, key_heads: int, size: int) -> int:
    """How often to repeat each key head, so that the rank with the most query heads has as few as possible."""
    group = heads // key_heads
    loads = {n: head_shares(key_heads * n, size)[0] * (group // n) for n in range(1, group + 1) if group % n == 0}
    return min(loads, key=lambda n: (loads[n], n))


def _own_part(
    bias: torch.Tensor | None, heads: int, key_heads: int, ulysses: MeshAxis, ring: AxisLayout
) -> torch.Tensor | None:
    """The part of a bias for this rank's share of the heads and the queries of its chunk."""
    if bias is None:
        return None
    if bias.shape[1] > 1:
        shares = [share * (heads // key_heads) for share in head_shares(key_heads, ulysses.size)]
        bias = bias.narrow(1, sum(shares[: ulysses.rank]), shares[ulysses.rank])
    if bias.shape[2] > 1:
        chunk, replicated = ring.axis.rank, ring.replicated
        own_chunk = bias.narrow(2, replicated + sum(ring.lengths[:chunk]), ring.lengths[chunk])
        bias = torch.cat((bias[:, :, :replicated], own_chunk), dim=2)
    return bias
