"""Ulysses attention: trade sequence for heads, attend over the whole sequence, trade back.

After DeepSpeed-Ulysses (arXiv 2309.14509), with two changes: the shares of the ranks may differ in length, and Q, K, V
and the key mask travel in one exchange. Called by `sp_core.attention.hybrid`.

Shapes: B batch, L this rank's tokens, S all ranks' tokens, H heads, D head size, P ranks.
Ranks hold arbitrary pieces of the sequence (text and image pieces side by side): attention without a causal mask does
not mind the order, as long as keys, values and mask share it.
"""

from collections.abc import Callable

import torch

from sp_core import collectives
from sp_core.mesh import MeshAxis

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""q, k, v `(B, S, H/P, D)` and an additive key mask `(B, S)` -> `(B, S, H/P, D)`."""


def ulysses_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    attend: Attend,
    lengths: list[int],
    axis: MeshAxis,
) -> torch.Tensor:
    """Attention of this rank's queries over all ranks' keys.

    Args:
        query: `(B, L, H, D)`, this rank's share; key and value alike.
        key: see query.
        value: see query.
        mask: this rank's share of an additive key mask, `(B, L)`.
        attend: attention over the whole sequence for a share of the heads.
        lengths: tokens of each rank, `lengths[axis.rank] == L`.
        axis: the P ranks; P must divide H.

    Returns:
        `(B, L, H, D)`.
    """
    if axis.size == 1:
        return attend(query, key, value, mask)
    batch, local, heads, head_size = query.shape
    mine = heads // axis.size
    per_token = batch * mine * head_size  # of one of q, k, v
    per_mask = batch if mask is not None else 0

    # To each rank [q | k | v | mask] of my tokens, for its heads: packed in one pass, so that each tensor is contiguous
    # on arrival.
    packed = query.new_empty((axis.size, local * (3 * per_token + per_mask)))
    projections = packed[:, : local * 3 * per_token].unflatten(1, (3, batch, local, mine, head_size))
    for i, projection in enumerate((query, key, value)):
        projections[:, i] = projection.unflatten(2, (axis.size, mine)).movedim(2, 0)
    if mask is not None:
        packed[:, local * 3 * per_token :] = mask.reshape(-1)
    sizes = [length * (3 * per_token + per_mask) for length in lengths]
    arrived = collectives.all_to_all(packed.view(-1), [packed.shape[1]] * axis.size, sizes, axis).split(sizes)
    shares = [
        message[: length * 3 * per_token].view(3, batch, length, mine, head_size)
        for message, length in zip(arrived, lengths, strict=True)
    ]
    whole = torch.cat(shares, dim=2)  # (3, B, S, H/P, D)
    key_mask = None
    if mask is not None:
        ends = [
            message[-batch * length :].view(batch, length) for message, length in zip(arrived, lengths, strict=True)
        ]
        key_mask = torch.cat(ends, dim=1)

    attended = attend(whole[0], whole[1], whole[2], key_mask)  # (B, S, H/P, D)

    back = [length * per_token for length in lengths]
    outgoing = torch.cat([share.reshape(-1) for share in attended.split(lengths, dim=1)])
    returned = collectives.all_to_all(outgoing, back, [local * per_token] * axis.size, axis)
    return returned.view(axis.size, batch, local, mine, head_size).movedim(0, 2).flatten(2, 3)
