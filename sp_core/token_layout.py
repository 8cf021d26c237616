"""Which tokens of a stream each sequence rank holds: arithmetic on lengths, the same on every rank, no communication.

A `Region` (`sp_core.region`) makes these when something is split; attention reads them.

Shapes: R replicated tokens, which every rank holds; L tokens that this rank holds (R among them); S tokens of all
streams.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import pad

from sp_core.mesh import MeshAxis, ParallelMesh


@dataclass(frozen=True)
class Stream:
    """How a sequence of tokens is divided among `size` ranks.

    Ragged: shares differ by at most one token, the longer ones first. Padded: equal shares, zeros after the last token.
    Every rank holds at least one token of a non-empty stream, because model code reshapes with -1 and fails on empty
    tensors: a stream with fewer tokens than ranks is always padded.

    Attributes:
        length: tokens that are split, without padding.
        size: ranks.
        padded: whether shares are padded to the same length.
        replicated: tokens in front of them that every rank holds.
        trimmed: whether padding is left out of the counts, as attention does if it can.
    """

    length: int
    size: int
    padded: bool = False
    replicated: int = 0
    trimmed: bool = False

    def share(self, rank: int) -> int:
        """Split tokens on a rank, padding included. Plain arithmetic, so that a traced length stays a symbol."""
        if self.trimmed:
            return replace(self, trimmed=False).real[rank]
        if self.padded or self.length < self.size:
            return (self.length + self.size - 1) // self.size
        return (self.length + self.size - 1 - rank) // self.size

    @property
    def shares(self) -> list[int]:
        """Split tokens on each rank, padding included."""
        return [self.share(rank) for rank in range(self.size)]

    @property
    def real(self) -> list[int]:
        """Split tokens on each rank, without padding."""
        left = self.length
        counts = []
        for share in self.shares:
            counts.append(min(share, left))
            left -= counts[-1]
        return counts

    @property
    def held(self) -> list[int]:
        """All tokens on each rank."""
        return [self.replicated + share for share in self.shares]

    @property
    def total(self) -> int:
        """All tokens, without padding."""
        return self.replicated + self.length


@dataclass(frozen=True)
class AxisLayout:
    """How the tokens of one attention are divided among the ranks of one mesh axis.

    Attributes:
        axis: the ranks.
        lengths: split tokens of each rank, padding included.
        replicated: R, tokens in front of them that every rank holds.
    """

    axis: MeshAxis
    lengths: tuple[int, ...]
    replicated: int


@dataclass(eq=False)
class TokenLayout:
    """The streams of one attention side by side, seen from one rank.

    Attributes:
        streams: in the order in which attention joins them. Tokens that every rank holds come first.
        rank: this rank.
        order_known: whether the order of the streams is known.

    Raises:
        ValueError: tokens that every rank holds come after others.
    """

    streams: tuple[Stream, ...]
    rank: int
    order_known: bool = True
    _order: torch.Tensor | None = field(default=None, repr=False)
    _real: torch.Tensor | None = field(default=None, repr=False)
    _trimmed: "TokenLayout | None" = field(default=None, repr=False)
    _last_mask: tuple[torch.Tensor | None, int | None, object] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        split = False
        for stream in self.streams:
            if split and stream.replicated:
                raise ValueError(
                    f"{[s.replicated for s in self.streams]} tokens of the streams stay whole, but only the first "
                    "stream's can, because attention expects them in front"
                )
            split = split or stream.length > 0
        self.replicated = sum(stream.replicated for stream in self.streams)
        """R."""
        self.lengths = [sum(of_rank) for of_rank in zip(*(stream.shares for stream in self.streams), strict=True)]
        """Split tokens of each rank, over all streams, padding included."""
        self.local = self.replicated + self.lengths[self.rank]
        """L."""
        self.total = sum(stream.total for stream in self.streams)
        """S."""
        self.has_padding = any(stream.shares != stream.real for stream in self.streams)
        """Whether any rank holds padding."""

    def after(self, joint: int) -> "TokenLayout":
        """This layout with `joint` more tokens in front, which every rank holds."""
        if not joint:
            return self
        front = Stream(0, self.streams[0].size, replicated=joint)
        return TokenLayout((front, *self.streams), self.rank, self.order_known)

    def trimmed(self) -> "TokenLayout | None":
        """The same tokens without padding; None if a rank would have none left.

        Raises:
            ValueError: it depends on the order of the streams, which is not known.
        """
        if self._trimmed is None:
            self._require_order("streams need padding on these ranks")
            streams = tuple(replace(stream, trimmed=True) for stream in self.streams)
            self._trimmed = TokenLayout(streams, self.rank, self.order_known)
        return self._trimmed if all(self._trimmed.lengths) else None

    def trim(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(B, L, ...)` without this rank's padding."""
        held = [stream.held[self.rank] for stream in self.streams]
        real = [stream.replicated + stream.real[self.rank] for stream in self.streams]
        parts = tensor.split(held, dim=1)
        return torch.cat([part[:, :length] for part, length in zip(parts, real, strict=True)], dim=1)

    def untrim(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `trim`: padding is 0."""
        held = [stream.held[self.rank] for stream in self.streams]
        real = [stream.replicated + stream.real[self.rank] for stream in self.streams]
        parts = tensor.split(real, dim=1)
        padded = [
            pad(part, (*(0, 0) * (tensor.ndim - 2), 0, length - part.shape[1]))
            for part, length in zip(parts, held, strict=True)
        ]
        return torch.cat(padded, dim=1)

    def over(self, mesh: ParallelMesh) -> tuple[AxisLayout, AxisLayout]:
        """The same tokens by axis: those of this rank's Ulysses group, and the chunks of all groups on the ring.

        Sequence ranks count Ulysses innermost, so a group's tokens are neighbors in `lengths`.
        """
        ulysses, ring = mesh.axis("ulysses"), mesh.axis("ring")
        starts = range(0, len(self.lengths), ulysses.size)
        groups = [tuple(self.lengths[start : start + ulysses.size]) for start in starts]
        chunks = tuple(sum(group) for group in groups)
        return (
            AxisLayout(ulysses, groups[ring.rank], self.replicated),
            AxisLayout(ring, chunks, self.replicated),
        )

    def once_per_mask(self, mask: torch.Tensor | None, version: int | None, prepare: Callable[[], object]) -> object:
        """The result of `prepare` for this mask and version. The last is kept, since a model's layers share a mask."""
        if self._last_mask is None or self._last_mask[0] is not mask or self._last_mask[1] != version:
            self._last_mask = (mask, version, prepare())
        return self._last_mask[2]

    def order(self, device: torch.device) -> torch.Tensor:
        """`(R + sum(lengths),)`: the positions in the whole sequence, its streams side by side, of the tokens that the
        ranks hold, rank by rank; -1 for padding.

        Raises:
            ValueError: it depends on the order of the streams, which is not known.
        """
        if self._order is None:
            self._require_order("a mask of the whole sequence is given")
            self._order = torch.cat(self._spans(device))
        return self._order

    def _spans(self, device: torch.device) -> list[torch.Tensor]:
        spans = [torch.arange(self.replicated, device=device)]
        for rank in range(len(self.lengths)):
            offset = 0
            for stream in self.streams:
                real = stream.real
                first = offset + stream.replicated + sum(real[:rank])
                spans.append(torch.arange(first, first + real[rank], device=device))
                spans.append(torch.full((stream.shares[rank] - real[rank],), -1, device=device))
                offset += stream.total
        return spans

    def own_order(self, device: torch.device) -> torch.Tensor:
        """`(L,)`: the part of `order` that this rank holds."""
        order, first = self.order(device), self.replicated + sum(self.lengths[: self.rank])
        return torch.cat((order[: self.replicated], order[first : first + self.lengths[self.rank]]))

    def real(self, device: torch.device) -> torch.Tensor | None:
        """`(L,)`, False for this rank's padding; None if no rank has any.

        Raises:
            ValueError: it depends on the order of the streams, which is not known.
        """
        if not self.has_padding:
            return None
        if self._real is None:
            self._require_order("streams need padding on these ranks")
            spans = [
                torch.arange(stream.held[self.rank], device=device) < stream.replicated + stream.real[self.rank]
                for stream in self.streams
            ]
            self._real = torch.cat(spans)
        return self._real

    def _require_order(self, why: str) -> None:
        if len(self.streams) > 1 and not self.order_known:
            raise ValueError(
                f"{why}, and diffusers' _cp_plan does not say in which order attention joins the streams of "
                f"{[stream.length for stream in self.streams]} tokens; pass plan= with the streams in that order"
            )
