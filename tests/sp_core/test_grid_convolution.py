"""Convolutions over a grid of tokens that lie on many ranks: the answer and the bytes, and what is refused."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from sp_core import collectives
from sp_core.degrees import ParallelDegrees
from sp_core.hooks import apply_sequence_parallel
from sp_core.mesh import MeshAxis, ParallelMesh
from sp_core.sp_plan import (
    SequenceParallelConvolution,
    SequenceParallelGrid,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.sp_core.test_same_answer import LAYOUTS

C = 6

PLAN: SequenceParallelModelPlan = {
    "block": {
        "tokens": SequenceParallelInput(split_dim=1),
        "frames": SequenceParallelGrid(),
        "height": SequenceParallelGrid(),
        "width": SequenceParallelGrid(),
    },
    "block.space": SequenceParallelConvolution(rows="height"),
    "block.time": SequenceParallelConvolution(rows="frames"),
    "out": SequenceParallelOutput(gather_dim=1),
}

GRIDS = {"picture": (1, 5, 7), "clip": (3, 4, 3), "thin": (5, 1, 2), "fewer tokens than ranks": (1, 1, 2)}
"""Frames, rows and columns. On four ranks the shares of most are smaller than what a kernel reaches."""


class Block(nn.Module):
    """Puts its tokens back onto their grid: `(B, F x H x W, C)` to the same."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.space = nn.Conv2d(C, C, (3, kernel), 1, (1, kernel // 2), groups=C)
        self.time = nn.Conv2d(C, C, (3, 1), 1, (1, 0), bias=False)

    def forward(self, tokens: torch.Tensor, frames: int, height: int, width: int) -> torch.Tensor:
        grid = tokens.unflatten(1, (frames, height, width))
        batch, frames, height, width, _ = grid.shape
        space = self.space(grid.flatten(0, 1).permute(0, 3, 1, 2))
        time = space.unflatten(0, (batch, frames)).flatten(3).transpose(1, 2)
        return self.time(time.contiguous()).flatten(2).transpose(1, 2)


class Model(nn.Module):
    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.out = Block(kernel), nn.Identity()

    def forward(self, tokens: torch.Tensor, *grid: int) -> Any:
        return self.out(self.block(tokens, *grid))


def tokens_of(grid: tuple[int, int, int]) -> torch.Tensor:
    frames, height, width = grid
    return torch.randn(2, frames * height * width, C, generator=torch.Generator().manual_seed(1))


def lost(packed: torch.Tensor, send_sizes: list[int], receive_sizes: list[int], axis: MeshAxis) -> torch.Tensor:
    """An exchange in which nothing arrives."""
    return packed.new_zeros(sum(receive_sizes))


def convolve(mesh: ParallelMesh, kernel: int, blind: bool) -> tuple[list[float], float]:
    """How far each grid's answer is from that of one process, and the bytes sent for the picture.

    `blind`: all that other ranks send is lost.
    """
    found, sent = [], 0.0
    for grid in GRIDS.values():
        model = Model(kernel)
        with torch.no_grad():
            plain = model(tokens_of(grid), *grid)
            handle = apply_sequence_parallel(model, PLAN, mesh)
            mesh.traffic.take_sent()
            with mock.patch.object(collectives, "all_to_all", lost if blind else collectives.all_to_all):
                found.append(error(model(tokens_of(grid), *grid), plain))
            if grid == GRIDS["picture"]:
                sent = mesh.traffic.take_sent().get("all_to_all", 0.0)
            handle.remove()
            assert torch.equal(model(tokens_of(grid), *grid), plain)
    return found, sent


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_answer_of_one_process(ranks: RankPool, layout: str, kernel: int) -> None:
    for found, _ in ranks.run(LAYOUTS[layout], convolve, kernel, False):
        assert {grid: by for grid, by in zip(GRIDS, found, strict=True) if not by <= BAR} == {}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_neighbors_hold_matters(ranks: RankPool, size: int) -> None:
    outcomes = [found for found, _ in ranks.run(ParallelDegrees(ring_degree=size), convolve, 3, True)]
    assert all(max(of_grid) > 100 * BAR for of_grid in zip(*outcomes, strict=True))


def test_only_what_the_kernel_reaches_is_sent(ranks: RankPool) -> None:
    """A row of 7 and a token each way for 3 x 3, and nothing along frames, of which there is one."""
    sent = [bytes_sent for _, bytes_sent in ranks.run(ParallelDegrees(ulysses_degree=2), convolve, 3, False)]
    assert sent == [8 * 2 * C * 4] * 2


def test_modules_that_do_not_keep_the_grid_are_refused() -> None:
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    for wrong in (nn.Identity(), nn.Conv2d(C, C, 3), nn.Conv2d(C, C, 3, 2, 1), nn.Conv2d(C, C, 2, 1, 1)):
        model = Model()
        model.block.space = wrong  # type: ignore[assignment]
        with pytest.raises(ValueError, match="Conv2d of odd kernel"):
            apply_sequence_parallel(model, PLAN, mesh)


def wrongly(mesh: ParallelMesh, rows: str, grid: tuple[int, int, int]) -> Any:
    plan: SequenceParallelModelPlan = PLAN | {"block.space": SequenceParallelConvolution(rows=rows)}
    model = Model()
    apply_sequence_parallel(model, plan, mesh)
    return model(tokens_of((1, 5, 7)), *grid)


@pytest.mark.parametrize(
    ("rows", "grid", "said"),
    [
        ("columns", (1, 5, 7), "no SequenceParallelGrid of that name"),
        ("height", (1, 5, 6), "a grid of 1 x 5 x 6 tokens"),
        ("height", (1, 5, 7.0), "is float, but the plan says that it counts tokens"),
    ],
)
def test_a_plan_that_contradicts_the_tokens_is_refused(ranks: RankPool, rows: str, grid: Any, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        ranks.run(ParallelDegrees(ulysses_degree=2), wrongly, rows, grid)
