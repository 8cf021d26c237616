"""Ulysses inside, ring outside: attention over all sequence ranks of a mesh. Either axis may have size 1.

The ranks of a Ulysses group trade sequence for heads, and then hold one chunk of the sequence for a share of the heads;
the ring carries those chunks. After USP (arXiv 2405.07719). Called by the seam for every attention inside a region.
"""

import torch

from sp_core.attention.ring import ring_attention
from sp_core.attention.ulysses import ulysses_attention
from sp_core.mesh import ParallelMesh


def sequence_parallel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    lengths: list[int],
    mesh: ParallelMesh,
) -> torch.Tensor:
    """Attention of this rank's queries over the keys of all sequence ranks.

    Args:
        query: `(B, L, H, D)`, this rank's share; key and value alike.
        key: see query.
        value: see query.
        mask: this rank's share of a key mask, `(B, L)` or `(1, L)`, boolean (True takes part) or additive.
        scale: of the scores; None is 1/sqrt(D).
        lengths: tokens of each sequence rank.
        mesh: the ranks; the Ulysses degree must divide H.

    Returns:
        `(B, L, H, D)`.
    """
    ring, ulysses = mesh.axis("ring"), mesh.axis("ulysses")
    by_ring = [lengths[start : start + ulysses.size] for start in range(0, len(lengths), ulysses.size)]
    chunks = [sum(of_group) for of_group in by_ring]

    def over_the_ring(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return ring_attention(query, key, value, mask, scale, chunks, ring)

    additive = None if mask is None else _as_additive(mask, query.dtype).expand(query.shape[:2])
    return ulysses_attention(query, key, value, additive, over_the_ring, by_ring[ring.rank], ulysses)


def _as_additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype is not torch.bool:
        raise ValueError(f"a mask must be boolean or floating (additive), got {mask.dtype}; convert it with .bool()")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
