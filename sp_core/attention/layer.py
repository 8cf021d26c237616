"""The attention layer for models written with spray: across ranks when its model is parallelized, local otherwise.

    self.attention = SequenceParallelAttention()
    ...
    hidden_states = self.attention(query, key, value, mask)

Shapes: B batch, L tokens that this rank holds (all of them in a plain model), J joint tokens, H query heads, K key
heads, D head size.
"""

from typing import Literal

import torch
from torch import nn

from sp_core import kernels
from sp_core.attention.region_attention import AttentionSite, region_attention


class SequenceParallelAttention(nn.Module):
    """Softmax attention over the tokens of all sequence ranks, without a causal mask.

    Joint tokens (a prompt that the image attends to and that attends to the image) may be whole on every rank, or
    split like the rest. With streams that the plan splits, concatenate them in the plan's order and pass one tensor.

    Args:
        scale: of the scores; None is 1/sqrt(D).
        local: never attend across ranks, because every rank has the tokens whole (a refiner of the text,
            cross-attention to it).
    """

    def __init__(self, scale: float | None = None, *, local: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.local = local
        self.site: AttentionSite | None = None
        """This layer's place in a parallelized model; None in a plain model."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        joint_query: torch.Tensor | None = None,
        joint_key: torch.Tensor | None = None,
        joint_value: torch.Tensor | None = None,
        joint_strategy: Literal["front", "rear"] = "front",
        joint_sharded: bool = False,
    ) -> torch.Tensor:
        """Attention of this rank's queries.

        Args:
            query: `(B, L, H, D)`.
            key: `(B, L, K, D)`; K divides H, and each key head serves H / K consecutive query heads.
            value: as key.
            mask: boolean (True takes part) or additive; for this rank's keys `(B, J + L)` or `(B, 1, 1, J + L)`, or for
                the S of all ranks `(B, S)` or `(B, H or 1, S or 1, S)`. In the order in which the tokens are joined.
            joint_query: `(B, J, H, D)`; all three joint tensors are given or none.
            joint_key: `(B, J, K, D)`.
            joint_value: as joint_key.
            joint_strategy: whether the joint tokens come before the others or after them.
            joint_sharded: whether they are split over the ranks, as a stream of the plan in that place; else every
                rank holds all of them.

        Returns:
            `(B, L, H, D)`, or `(B, J + L, H, D)` in the order of joint_strategy.

        Raises:
            ValueError: the tokens are not those that the plan split, or arguments that contradict each other.
        """
        joint = _joint(joint_query, joint_key, joint_value, joint_strategy)
        if joint is None:
            return self._attend(query, key, value, mask, 0)
        rear = joint_strategy == "rear"
        if rear and joint_sharded:
            sides = ((query, joint[0]), (key, joint[1]), (value, joint[2]))
        else:
            sides = ((joint[0], query), (joint[1], key), (joint[2], value))
        query, key, value = (torch.cat(side, dim=1) for side in sides)
        if joint_sharded:
            return self._attend(query, key, value, mask, 0)
        count = joint[0].shape[1]
        if rear and mask is not None:  # whole tokens come first for the ranks, last for the caller
            mask = mask.roll(count, dims=-1)
            mask = mask.roll(count, dims=-2) if mask.ndim == 4 and mask.shape[2] > 1 else mask
        attended = self._attend(query, key, value, mask, count)
        return torch.cat((attended[:, count:], attended[:, :count]), dim=1) if rear else attended

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, joint: int
    ) -> torch.Tensor:
        if self.site is None or self.local:
            return kernels.local_attention(query, key, value, mask, self.scale)
        return region_attention(query, key, value, mask, self.scale, self.site, joint)


def _joint(
    query: torch.Tensor | None, key: torch.Tensor | None, value: torch.Tensor | None, strategy: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    if strategy not in ("front", "rear"):
        raise ValueError(f"joint_strategy must be 'front' or 'rear', got {strategy!r}")
    if query is None and key is None and value is None:
        return None
    if query is None or key is None or value is None:
        raise ValueError("joint_query, joint_key and joint_value go together: give all three or none")
    return query, key, value
