"""Small models without attention, for tests of plans and hooks."""

from typing import Any

import torch
from torch import nn

from sp_core.degrees import ParallelDegrees
from sp_core.sp_plan import SequenceParallelInput
from sp_core.sp_sharding import sp_gather, sp_shard

SPLIT = SequenceParallelInput(split_dim=1)
TWO = ParallelDegrees(ulysses_degree=2)


class Toy(nn.Module):
    """Sums over the sequence through its blocks; shards itself where told to."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ToyBlock(), ToyBlock()])
        self.outputs = nn.ModuleDict({"main": nn.Identity()})

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        for block in self.blocks:
            x = block(x, y)
        return self.outputs["main"](x)


class ToyBlock(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return x * 2 if y is None else x * 2 + y


class Intrusive(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        x = sp_shard(x, 1)
        return sp_gather(x + 1, 1), x.shape[1]
