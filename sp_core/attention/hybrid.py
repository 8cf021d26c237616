"""Ulysses inside, ring outside: attention over all sequence ranks of a mesh. Either axis may have size 1.

The ranks of a Ulysses group trade sequence for heads, and then hold one chunk of the sequence for a share of the heads;
the ring carries those chunks. After USP (arXiv 2405.07719). Called by `sp_core.attention.region`.

Shapes: B batch, R tokens that every rank holds, L this rank's tokens, H query heads, K key heads, D head size.
"""

import torch

from sp_core.attention.masks import RankMask
from sp_core.attention.ring import ring_attention
from sp_core.attention.ulysses import ulysses_attention
from sp_core.degrees import head_shares
from sp_core.mesh import ParallelMesh
from sp_core.token_layout import TokenLayout


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
        key: `(B, R + L, K, D)`; K divides H, and each key head serves the H / K query heads that follow one another.
        value: as key.
        mask: see `RankMask`.
        scale: of the scores; None is 1/sqrt(D).
        layout: which tokens each sequence rank holds.
        mesh: the ranks.

    Returns:
        `(B, R + L, H, D)`.
    """
    lengths, replicated = layout.lengths, layout.replicated
    ring, ulysses = mesh.axis("ring"), mesh.axis("ulysses")
    by_ring = [lengths[start : start + ulysses.size] for start in range(0, len(lengths), ulysses.size)]
    chunks = [sum(of_group) for of_group in by_ring]
    repeats = _key_repeats(query.shape[2], key.shape[2], ulysses.size)
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    bias = mask.bias
    if bias is not None:
        bias = _of_heads(bias, key.shape[2], query.shape[2], ulysses.rank, ulysses.size)
        if bias.shape[2] > 1:
            own_chunk = bias.narrow(2, replicated + sum(chunks[: ring.rank]), chunks[ring.rank])
            bias = torch.cat((bias[:, :, :replicated], own_chunk), dim=2)

    def over_the_ring(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor | None
    ) -> torch.Tensor:
        return ring_attention(query, key, value, keys, bias, scale, chunks, replicated, ring)

    keys = None if mask.keys is None else mask.keys.expand(query.shape[:2])
    return ulysses_attention(query, key, value, keys, over_the_ring, by_ring[ring.rank], replicated, ulysses)


def _key_repeats(heads: int, key_heads: int, size: int) -> int:
    """How often to repeat each key head, so that the rank with most query heads has as few as can be."""
    group = heads // key_heads
    loads = {n: head_shares(key_heads * n, size)[0] * (group // n) for n in range(1, group + 1) if group % n == 0}
    return min(loads, key=lambda n: (loads[n], n))


def _of_heads(bias: torch.Tensor, key_heads: int, heads: int, rank: int, size: int) -> torch.Tensor:
    """The rows of a mask per head that belong to the heads of one Ulysses rank."""
    if bias.shape[1] == 1:
        return bias
    shares = [share * (heads // key_heads) for share in head_shares(key_heads, size)]
    return bias.narrow(1, sum(shares[:rank]), shares[rank])
