"""A convolution over a grid of tokens that is divided among ranks.

A plan gives a module its share of the tokens as one line, by `SequenceParallelGrid`; this module implements
`SequenceParallelConvolution`. Each rank needs the tokens that its kernel reaches on both sides of its own: for 3 x 3,
one row and one token. The recorded lengths say which ranks hold them, so one exchange is enough. They may come from
several ranks, because a share may be smaller than the reach of the kernel.

`(B, C, 1, L)` of this rank's tokens come in, and as many go out. Called by `sp_core.hooks`. Under `torch.compile` it is
one opaque operator, and the region is looked up when the graph runs.

Shapes: a grid is P planes of N rows of W columns; plane after plane, row after row, its tokens are one line.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.functional import conv2d, pad

from sp_core import collectives
from sp_core.mesh import MeshAxis
from sp_core.region import Region, SequenceContext
from sp_core.sp_plan import SequenceParallelConvolution
from sp_core.sp_sharding import running_forward
from sp_core.token_layout import Stream


def bind(
    name: str, module: nn.Module, entry: SequenceParallelConvolution, context: SequenceContext
) -> Callable[[], None]:
    """Let a convolution see the tokens of other ranks.

    Args:
        name: the module's plan key, for messages.
        module: its weights may come later.
        entry: along which sizes of the grid its kernel lies.
        context: the context of the model.

    Returns:
        The function that undoes it.

    Raises:
        ValueError: the module is not a convolution that keeps the size of a grid.
    """
    if type(module) is not nn.Conv2d or not _keeps_size(module):
        raise ValueError(
            f"{name!r} is {module}, but SequenceParallelConvolution is for a Conv2d of odd kernel, stride 1, dilation "
            "1 and zeros of half its kernel around it"
        )
    bound: Any = module
    bound.__class__ = GridConvolution
    bound.site = ConvolutionSite(context, name, entry.rows)

    def undo() -> None:
        del bound.site
        bound.__class__ = nn.Conv2d

    return undo


@dataclass(frozen=True)
class ConvolutionSite:
    """One convolution of a parallelized model.

    Attributes:
        context: the model's.
        name: the module's plan key, for messages.
        rows: the size of the grid along which the first dimension of its kernel lies.
    """

    context: SequenceContext
    name: str
    rows: str


class GridConvolution(nn.Conv2d):
    """The class of a convolution while it is bound. It is a class, so that compiled blocks share their graph.

    Attributes:
        site: which one this is.
    """

    site: ConvolutionSite

    def forward(self, line: torch.Tensor) -> torch.Tensor:
        """`(B, C, 1, L)` to `(B, C', 1, L)`; padding becomes 0."""
        site = self.site
        if not torch.compiler.is_compiling():
            return _convolved(site.name, self.weight, self.bias, site.rows, site.context, line)
        return _convolution_operator(  # type: ignore[no-any-return]
            line, self.weight, self.bias, site.name, site.rows, site.context.number, site.context.noted
        )


def _keeps_size(module: nn.Conv2d) -> bool:
    return (
        all(size % 2 for size in module.kernel_size)
        and module.padding == tuple(size // 2 for size in module.kernel_size)
        and module.stride == module.dilation == (1, 1)
        and module.padding_mode == "zeros"
    )


def _convolved(
    name: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: str,
    context: SequenceContext,
    line: torch.Tensor,
) -> torch.Tensor:
    axis = context.mesh.axis("sequence")
    stream, grid, misfit = Stream(0, axis.size), (1, 1, 1), None
    try:
        stream, grid = _where(name, running_forward(context).region, rows, line, axis)
    except ValueError as error:
        misfit = error
    context.agree(f"convolution {name!r}", f"{name}/convolution", misfit)
    held, count = line.shape[-1], stream.real[axis.rank]
    planes, height, width = grid
    up, left = (size // 2 for size in weight.shape[2:])
    reach = min(up, height - 1) * width + left  # beyond the last row of a plane everything is 0
    first = sum(stream.real[: axis.rank])
    tokens = with_neighbors(line[:, :, 0, :count], stream.real, reach, axis)
    tokens = pad(tokens, (up * width + left - reach,) * 2)
    if not count:  # all of them are padding
        return line.new_zeros(line.shape[0], len(weight), 1, held)
    if left or planes > 1:
        convolved = _row_by_row(weight, bias, tokens, grid, first, count)
    else:
        convolved = _column_by_column(weight, bias, tokens, width, count)
    return pad(convolved, (0, held - count)).unsqueeze(2)


@torch.library.custom_op("sp_core::convolution", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _convolution_operator(
    line: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    name: str,
    rows: str,
    number: int,
    noted: torch.Tensor,
) -> torch.Tensor:
    """`noted` is the tensor that the operators of the grid change: nothing else keeps them in front of this one."""
    return _convolved(name, weight, bias, rows, SequenceContext.numbered(number), line).contiguous()


@_convolution_operator.register_fake
def _(
    line: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    name: str,
    rows: str,
    number: int,
    noted: torch.Tensor,
) -> torch.Tensor:
    return line.new_empty(line.shape[0], weight.shape[0], 1, line.shape[-1])


def _where(
    name: str, region: Region, rows: str, line: torch.Tensor, axis: MeshAxis
) -> tuple[Stream, tuple[int, int, int]]:
    """How the tokens lie on the ranks, and the planes, rows and columns of the grid."""
    layout, sizes = region.layout(), list(region.grid.values())
    if layout is None or rows not in region.grid:
        raise ValueError(
            f"convolution {name!r} lies along {rows!r}, but no tokens are split or the plan has no "
            f"SequenceParallelGrid of that name there; it has {list(region.grid)}"
        )
    at = list(region.grid).index(rows)
    grid = prod(sizes[:at]), sizes[at], prod(sizes[at + 1 :])
    (stream, *others) = layout.streams
    if others or stream.replicated or stream.length != prod(grid):
        raise ValueError(
            f"convolution {name!r} is over a grid of {' x '.join(map(str, sizes))} tokens, but the streams "
            f"{region.streams} are split; it must be one of as many tokens"
        )
    if line.shape[2:] != (1, stream.shares[axis.rank]):
        raise ValueError(
            f"convolution {name!r} is given {tuple(line.shape)} on sequence rank {axis.rank}, not one line of the "
            f"{stream.shares[axis.rank]} tokens there"
        )
    return stream, grid


def with_neighbors(tokens: torch.Tensor, lengths: list[int], reach: int, axis: MeshAxis) -> torch.Tensor:
    """This rank's tokens between those of other ranks. A collective of the axis.

    Args:
        tokens: `(B, C, lengths[rank])`.
        lengths: tokens of each rank, which follow one another.
        reach: how many tokens are wanted on each side.
        axis: the ranks.

    Returns:
        `(B, C, reach + lengths[rank] + reach)`, 0 beyond both ends of the line; without neighbors for a rank that has
        no tokens.
    """
    starts = [sum(lengths[:rank]) for rank in range(axis.size)]
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]

    def wanted(of: int, by: int) -> tuple[int, int]:
        """The range of tokens of rank `of` that rank `by` wants, counted from the first token of `of`."""
        if of == by or not lengths[by]:
            return 0, 0
        if of < by:
            return max(0, min(lengths[of], starts[by] - reach - starts[of])), lengths[of]
        return 0, max(0, min(lengths[of], ends[by] + reach - starts[of]))

    everyone, rank = range(axis.size), axis.rank
    parts = {rank: tokens}
    if axis.size > 1:
        sent = [tokens[..., slice(*wanted(rank, other))] for other in everyone]
        counts = [end - begin for begin, end in (wanted(other, rank) for other in everyone)]
        per_token = tokens.shape[0] * tokens.shape[1]
        received = collectives.all_to_all(
            torch.cat([part.reshape(-1) for part in sent]),
            [part.numel() for part in sent],
            [count * per_token for count in counts],
            axis,
        )
        arrived = received.split([count * per_token for count in counts])
        parts |= {
            other: part.view(*tokens.shape[:2], counts[other])
            for other, part in enumerate(arrived)
            if other != rank and counts[other]
        }
    if not lengths[rank]:
        return tokens
    joined = torch.cat([parts[other] for other in sorted(parts)], dim=-1)
    return pad(joined, (max(0, reach - starts[rank]), max(0, ends[rank] + reach - ends[-1])))


def _column_by_column(
    weight: torch.Tensor, bias: torch.Tensor | None, tokens: torch.Tensor, width: int, count: int
) -> torch.Tensor:
    """A kernel of one column on one plane, on tokens with their neighbors: `(B, C', count)`."""
    shifted = [tokens[..., row * width : row * width + count] for row in range(weight.shape[2])]
    return conv2d(torch.stack(shifted, dim=2), weight, bias, groups=_groups(weight, tokens)).squeeze(2)


def _groups(weight: torch.Tensor, tokens: torch.Tensor) -> int:
    """The number of groups of the convolution, each of which sees a part of the features."""
    return tokens.shape[1] // weight.shape[1]


def _row_by_row(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    grid: tuple[int, int, int],
    first: int,
    count: int,
) -> torch.Tensor:
    """Any kernel, on tokens with their neighbors: `(B, C', count)`.

    Args:
        weight: of the convolution.
        bias: of the convolution.
        tokens: `(B, C, reach + count + reach)`.
        grid: planes, rows and columns.
        first: the place of this rank's first token in the whole line.
        count: its tokens.
    """
    _, height, width = grid
    up, left = (size // 2 for size in weight.shape[2:])
    top, bottom = first // width, (first + count - 1) // width + 1  # rows, counted through all planes
    begin = first - up * width - left  # of the tokens that are here
    before, after = begin - (top - up) * width, (bottom + up) * width - (begin + tokens.shape[-1])
    rows = pad(tokens, (before, after)).unflatten(-1, (-1, width))  # whole rows: those tokens do not matter, or are 0

    def by_plane(start: int, stop: int) -> list[tuple[int, int]]:
        """These rows, cut where a plane ends."""
        planes = range(start // height, (stop - 1) // height + 1)
        return [(max(start, plane * height), min(stop, (plane + 1) * height)) for plane in planes]

    pieces = [rows[:, :, start - top + up : stop - top + up] for start, stop in by_plane(top - up, bottom + up)]
    apart = [pad(piece, (0, 0, 0, up)) for piece in pieces[:-1]]  # no kernel reaches from one plane into the next
    padded = torch.cat((*apart, pieces[-1]), dim=2)
    convolved = conv2d(padded, weight, bias, padding=(0, left), groups=_groups(weight, tokens))
    here = []
    for start, stop in by_plane(top, bottom):
        crossed = start // height - (top - up) // height
        at = start - top + crossed * up
        here.append(convolved[:, :, at : at + stop - start])
    offset = first - top * width
    return torch.cat(here, dim=2).flatten(2)[..., offset : offset + count]
