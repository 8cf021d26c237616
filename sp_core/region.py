"""The streams and companions that are split in a running forward.

    SequenceContext   one per parallelized model: what never changes between its forwards
    RunningForward    one per forward: begins and ends with it
    Region            what is split now

`sp_core/README.md` defines region, stream and companion. Streams are recorded with their full lengths, so every rank
knows every rank's share: attention exchanges no sizes, and a gather once, to prove that the record is right.

`sp_core.sp_sharding` splits and gathers here, for hooks and for models that shard themselves; attention reads the
layout. Nothing here runs while torch.compile traces, except `begin` and `end`, which it leaves out of its graphs. A
context variable holds the running forward, so that forwards in other threads, and one inside another, keep apart.
"""

import itertools
from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch.nn.functional import pad

from sp_core import collectives, kernels
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.token_layout import Stream, TokenLayout

_running: ContextVar["RunningForward | None"] = ContextVar("running forward", default=None)
_numbers = itertools.count()
_contexts: WeakValueDictionary[int, "SequenceContext"] = WeakValueDictionary()
"""Weak: a context dies with the hooks of its model."""

_REMEMBERED = 4096
"""Checks that a context remembers: each size of request, with each length of text, makes a few."""


@dataclass(frozen=True, eq=False)
class SequenceContext:
    """How one model is split.

    Attributes:
        mesh: the groups of the model's gang.
        places: the streams of the plan, by the name of the split that makes them, in the order in which attention joins
            them. Streams of `sp_shard` follow, in the order in which they are split.
        auto_pad: pad all splits to equal shares: a companion must be as long as a padded stream's shares.
        order_known: whether `places` is really the order in which attention joins the streams.
        local_attention: attention outside a region: `(query, key, value, mask, scale)` to output.
        number: finds this context from inside a compiled graph, which takes only plain arguments.
        noted: nothing; what a compiled graph says that it changes when it notes the size of a grid.
    """

    mesh: ParallelMesh
    places: Mapping[str, int] = field(default_factory=dict)
    auto_pad: bool = False
    order_known: bool = True
    local_attention: Callable[..., torch.Tensor] = kernels.local_attention
    number: int = field(default_factory=lambda: next(_numbers))
    noted: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    _settled: dict[ParallelDegrees, dict[Hashable, None]] = field(default_factory=dict)  # by layout, in order

    def __post_init__(self) -> None:
        _contexts[self.number] = self

    @classmethod
    def numbered(cls, number: int) -> "SequenceContext":
        """The context of this number."""
        return _contexts[number]

    def running(self) -> "RunningForward | None":
        """This model's forward that is running, the innermost if one contains another; None outside."""
        forward = _running.get()
        while forward is not None and forward.context is not self:
            forward = forward.outer
        return forward

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self) -> None:
        """A forward of the model starts; nothing is split."""
        _running.set(RunningForward(self, _running.get()))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """The forward is over, by return or by exception."""
        forward = self.running()
        if forward is not None:
            _running.set(forward.outer)

    def abandon(self) -> None:
        """The model is plain again. Drops forwards that were interrupted from outside and never ended."""
        while (forward := _running.get()) is not None and forward.context is self:
            _running.set(forward.outer)

    def is_settled(self, what: Hashable) -> bool:
        """Whether the ranks have compared this with one another, and agreed. In each layout anew: it has other peers.

        Args:
            what: must be alike on all ranks, as who exchanges and who does not depends on it.
        """
        return what in self._settled.get(self.mesh.degrees, {})

    def agree(self, who: str, what: Hashable, misfit: ValueError | None) -> None:
        """Raise if something does not fit the plan. Comes before its first exchange.

        Until it has fitted once, all ranks learn whether it fits on each of them: a wrong plan may fit on some by
        chance, and these would wait for the others in an exchange that never comes. Later calls exchange nothing.

        Args:
            who: it, for messages.
            what: it, alike on all ranks.
            misfit: why it does not fit on this rank; None: it does.
        """
        if not self.is_settled(what):
            somewhere = collectives.on_any_rank(misfit is not None, self.mesh.axis("sequence"))
            if somewhere and misfit is None:
                raise ValueError(f"{who} does not fit the plan on another rank; see there")
            if misfit is None:
                self.settle(what)
        if misfit is not None:
            raise misfit

    def settle(self, what: Hashable) -> None:
        """The ranks agree on this; the oldest agreements are forgotten, on all ranks alike."""
        settled = self._settled.setdefault(self.mesh.degrees, {})
        settled[what] = None
        if len(settled) > _REMEMBERED:
            del settled[next(iter(settled))]


class RunningForward:
    """One running forward of a parallelized model.

    Attributes:
        context: the model's.
        outer: the forward, of this or another parallelized model, inside which this one runs.
        region: what is split now.
        attended: whether any attention went across ranks so far.
    """

    def __init__(self, context: SequenceContext, outer: "RunningForward | None" = None) -> None:
        self.context = context
        self.outer = outer
        self.region = Region(context)
        self.attended = False
        self._sharded = 0
        self._gathers = 0

    @staticmethod
    def innermost() -> "RunningForward | None":
        """The innermost running forward of any parallelized model."""
        return _running.get()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # else each call's number would be a graph of its own
    def name_of_next_stream(self) -> str:
        """A name for a stream that the model's own code splits: a number, counted through the forward."""
        self._sharded += 1
        return f"sp_shard.{self._sharded - 1}"

    def split(
        self, tensor: torch.Tensor, dim: int, stream: str | None, *, padded: bool = False, replicated: int = 0
    ) -> torch.Tensor:
        """See `Region.split`; a stream that follows a gather opens a new region."""
        if stream is not None and self.region.is_closing:
            self.region = Region(self.context)
        return self.region.split(tensor, dim, stream, padded=padded, replicated=replicated)

    def gather(self, tensor: torch.Tensor, dim: int, stream: str | None = None, *, closes: bool = True) -> torch.Tensor:
        """See `Region.gather`."""
        self._gathers += 1
        return self.region.gather(tensor, dim, stream, closes=closes, place=self._gathers)

    def record_attention(self) -> None:
        """Note that an attention goes across ranks."""
        self.attended = True


class Region:
    """The streams and companions that are split now.

    Attributes:
        streams: by the name of their split, including those that have been gathered.
        companions: in the order in which they were split.
        grid: the sizes of the grid that the tokens form, by parameter name, the outermost first.
    """

    def __init__(self, context: SequenceContext) -> None:
        self._context = context
        self.streams: dict[str, Stream] = {}
        self.companions: list[Stream] = []
        self.grid: dict[str, int] = {}
        self._gathered: set[str] = set()
        self._layouts: dict[tuple[str, int, bool], TokenLayout] = {}

    @property
    def is_closing(self) -> bool:
        """Whether any stream is whole again. Attention no longer sees it, but it may be gathered once more."""
        return bool(self._gathered)

    def split(
        self, tensor: torch.Tensor, dim: int, stream: str | None, *, padded: bool = False, replicated: int = 0
    ) -> torch.Tensor:
        """This rank's share of `tensor` along `dim`: a view, unless it needs padding or has replicated tokens.

        Args:
            tensor: whole, the same on every rank.
            dim: the dimension to split.
            stream: the name under which attention and gather know these tokens; None for a companion.
            padded: equal shares, zeros after the last token.
            replicated: how many tokens at the beginning stay on every rank.

        Raises:
            ValueError: more tokens are to stay than there are.
        """
        if replicated and not 0 < replicated < tensor.shape[dim]:
            raise ValueError(
                f"{replicated} tokens are to stay whole, but dimension {dim} of shape {tuple(tensor.shape)} "
                f"has only {tensor.shape[dim]}"
            )
        axis = self._context.mesh.axis("sequence")
        split = Stream(tensor.shape[dim] - replicated, axis.size, padded or self._context.auto_pad, replicated)
        if stream is None:
            self.companions.append(split)
            if split.total == 1:  # one value for all tokens, or for the only one: nothing to split
                return tensor
        else:
            self.streams[stream] = split
            self._layouts.clear()
        real = split.real
        share = tensor.narrow(dim, replicated + sum(real[: axis.rank]), real[axis.rank])
        missing = split.shares[axis.rank] - real[axis.rank]
        if missing:
            share = pad(share, [0, 0] * (tensor.ndim - 1 - dim % tensor.ndim) + [0, missing])
        return torch.cat((tensor.narrow(dim, 0, replicated), share), dim) if replicated else share

    def gather(
        self, tensor: torch.Tensor, dim: int, stream: str | None = None, *, closes: bool = True, place: int = 0
    ) -> torch.Tensor:
        """The whole tensor, padding removed. A collective of the sequence ranks.

        Args:
            tensor: this rank's share.
            dim: the dimension that is split.
            stream: the parameter name by which it was split; None if the lengths say which stream it is.
            closes: whether attention no longer sees the stream.
            place: of this gather among those of the forward.

        Raises:
            ValueError: no stream of this region has the lengths of this tensor, or more than one has; on all ranks, if
                it happens at the first gather in this place of streams of these lengths.
        """
        name, found = self._compared(tensor.shape[dim], stream, place)
        whole = collectives.all_gather(tensor, dim, found.held, self._context.mesh.axis("sequence"))
        if found.replicated:  # each rank sent these tokens along: keep one copy
            parts = list(whole.split(found.held, dim))
            own = parts[0].narrow(dim, 0, found.replicated)
            shares = [part.narrow(dim, found.replicated, part.shape[dim] - found.replicated) for part in parts]
            whole = torch.cat((own, *shares), dim)
        if closes:
            self._gathered.add(name)
            self._layouts.clear()
        return whole.narrow(dim, 0, found.total)  # padding is at the end: shares without it are full

    def _compared(self, length: int, stream: str | None, place: int) -> tuple[str, Stream]:
        """The stream of which this rank gathers `length` tokens.

        The record knows the lengths of all ranks. The ranks compare their lengths with it once for each place and
        record, so that a wrong record raises on all of them. They compare at each gather only if it may mean streams
        with different shares. All ranks decide this alike.
        """
        axis = self._context.mesh.axis("sequence")
        candidates = self._candidates(stream)
        record = (place, stream, *self.streams.items(), *(self.companions if not self.streams else ()))
        ways = {tuple(split.held) for split in candidates.values()}
        if len(ways) == 1 and self._context.is_settled(record):
            (lengths,) = ways
            if length != lengths[axis.rank]:
                held = {name: split.held for name, split in candidates.items()}
                raise ValueError(
                    f"gather of {length} tokens on sequence rank {axis.rank}, but what was split lies on the ranks as "
                    f"{held}"
                )
            return self._stream_of(list(lengths), candidates)
        found = self._stream_of(collectives.all_lengths(length, axis), candidates)
        self._context.settle(record)
        return found

    def _candidates(self, stream: str | None) -> dict[str, Stream]:
        """The streams that a gather may mean which names this stream, or none."""
        if not self.streams:  # only rotations or masks were split
            return {f"companion {i}": companion for i, companion in enumerate(self.companions)}
        return {n: split for n, split in self.streams.items() if stream in (None, n, n.rpartition(".")[2])}

    def _stream_of(self, lengths: list[int], candidates: dict[str, Stream]) -> tuple[str, Stream]:
        """The stream with these lengths on the ranks. All ranks decide alike, because all know all lengths."""
        fitting = {name: split for name, split in candidates.items() if split.held == lengths}
        if not fitting:
            held = {name: split.held for name, split in self.streams.items()}
            raise ValueError(f"gather of shares {lengths}, but what was split lies on the ranks as {held}")
        if len({split.total for split in fitting.values()}) > 1:
            totals = {name: split.total for name, split in fitting.items()}
            raise ValueError(
                f"gather of shares {lengths}: these may belong to any of the streams {totals}; name one, by "
                "SequenceParallelOutput(..., stream=NAME) or sp_gather(..., stream=NAME)"
            )
        waiting = [name for name in fitting if name not in self._gathered]
        name = (waiting or list(fitting))[-1]
        return name, fitting[name]

    def layout(self, stream: str = "", joint: int = 0, *, gathered: bool = False) -> TokenLayout | None:
        """The split tokens as attention joins them; None if nothing is split.

        Args:
            stream: the streams that the attention sees, joined by `+`, in its order, each as often as it joins it: by
                parameter name, or by the name of the split that made it. Empty: it joins all.
            joint: tokens in front of them that every rank holds.
            gathered: as it was before anything was gathered.

        Raises:
            ValueError: no such stream is split.
        """
        key = (stream, joint, gathered)
        if key not in self._layouts:  # once a region, not once a layer
            split = {n: s for n, s in self.streams.items() if gathered or n not in self._gathered}
            if not split:
                return None
            ordered = sorted(split, key=self._place)
            joined = [n for each in stream.split("+") for n in ordered if each in ("", n, n.rpartition(".")[2])]
            streams = [split[n] for n in joined]
            if not streams:
                raise ValueError(f"attention over the stream {stream!r}, but only {list(split)} are split")
            rank = self._context.mesh.axis("sequence").rank
            layout = TokenLayout(tuple(streams), rank, self._context.order_known or len(streams) == 1)
            self._layouts[key] = layout.after(joint)
        return self._layouts[key]

    def _place(self, name: str) -> int:
        return self._context.places.get(name, len(self._context.places))

    def leading(self, count: int, stream: str) -> int:
        """How many of the first `count` tokens of a stream this rank holds.

        Raises:
            ValueError: no such stream is split.
        """
        layout = self.layout(stream)
        if layout is None:
            raise ValueError(f"the plan counts the first {count} tokens of {stream!r}, but it is not split here")
        real = layout.streams[0].real
        return min(max(count - sum(real[: layout.rank]), 0), real[layout.rank])
