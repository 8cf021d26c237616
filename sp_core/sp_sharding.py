"""Splitting and gathering one tensor, and the record of what is split in the running forward.

`SequenceShards` belongs to one parallelised model. Hooks (`sp_core.hooks`) and attention (`sp_core.attention`) share
it; `sp_shard` and `sp_gather` reach it from inside a forward, for models that shard themselves.

A *region* is the part of a forward in which a token stream is split: from its split to its gather. The streams of a
region (image, text) are recorded with their full lengths, so every rank knows every rank's share and attention
exchanges no sizes.

Under `torch.compile` splits and gathers are opaque operators, so that a compiled block keeps one graph and the record
is kept when it runs, not when it is traced.
"""

import itertools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.nn.functional import pad

from sp_core import collectives, kernels
from sp_core.mesh import ParallelMesh
from sp_core.token_layout import Stream, TokenLayout

_running: ContextVar["SequenceShards | None"] = ContextVar("running forward", default=None)
_numbers = itertools.count()
_records: WeakValueDictionary[int, "SequenceShards"] = WeakValueDictionary()


@dataclass(eq=False)
class SequenceShards:
    """What is split in the running forward of one model.

    Attributes:
        mesh: the groups of the model's gang.
        local_attention: attention outside a region: `(query, key, value, mask, scale)` to output.
        places: the order of the plan's streams, by the name of the split that makes them: that in which attention
            joins them. Streams of `sp_shard` stand behind, in the order in which they are split.
        auto_pad: pad all splits to equal shares: what goes along with a padded stream must be as long as it.
        streams: the token streams of the region, by the name of the split that made them.
        gathered: names of those that are whole again. Attention does not see them any more; they stay on record until
            another stream is split, which begins a new region.
        companions: what else is split and only goes along (masks, rotations).
        order_known: whether the order of the streams is that in which attention joins them.
        attended: whether any attention of this forward went across ranks.
        agreed: names of the attentions of which all ranks have found that they fit their regions.
        number: by which operators find this record.
    """

    mesh: ParallelMesh
    local_attention: Callable[..., torch.Tensor] = kernels.local_attention
    places: dict[str, int] = field(default_factory=dict)
    auto_pad: bool = False
    streams: dict[str, Stream] = field(default_factory=dict)
    gathered: set[str] = field(default_factory=set)
    companions: list[Stream] = field(default_factory=list)
    order_known: bool = True
    attended: bool = False
    agreed: set[str] = field(default_factory=set)
    number: int = field(default_factory=lambda: next(_numbers))
    _layouts: dict[tuple[str, int, bool], TokenLayout] = field(default_factory=dict)
    _outer: list["SequenceShards | None"] = field(default_factory=list)

    def __post_init__(self) -> None:
        _records[self.number] = self

    @classmethod
    def running(cls) -> "SequenceShards | None":
        """The record of the forward that is running in this context, if its model is parallelised."""
        return _running.get()

    @classmethod
    def numbered(cls, number: int) -> "SequenceShards":
        """The record of this number."""
        return _records[number]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self) -> None:
        """A forward of the model starts: nothing is split, whatever became of the forward before."""
        self._forget()
        self.attended = False
        self._outer.append(_running.get())
        _running.set(self)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """The forward is over, by return or by exception."""
        self._forget()
        if self._outer:
            _running.set(self._outer.pop())

    def abandon(self) -> None:
        """The model is plain again. A forward that was interrupted from outside may not have ended."""
        self._outer.clear()
        self._forget()
        if _running.get() is self:
            _running.set(None)

    def shard(
        self, tensor: torch.Tensor, dim: int, *, stream: str | None = None, padded: bool = False, replicated: int = 0
    ) -> torch.Tensor:
        """This rank's share of `tensor` along `dim`: a view, unless it needs padding.

        Args:
            tensor: whole, the same on every rank.
            dim: the dimension to split.
            stream: the name under which attention and gather know these tokens; None for what only goes along with
                them (masks, rotations).
            padded: equal shares, zeros behind the last token.
            replicated: how many tokens at the beginning stay on every rank.

        Raises:
            ValueError: more tokens are to stay than there are.
        """
        axis = self.mesh.axis("sequence")
        if torch.compiler.is_compiling():
            padded = padded or self.auto_pad
            return _shard_operator(  # type: ignore[no-any-return]
                tensor, dim, self.number, stream, padded, replicated, axis.rank, axis.size
            )
        if replicated and not 0 < replicated < tensor.shape[dim]:
            raise ValueError(
                f"{replicated} tokens are to stay whole, but dimension {dim} of shape {tuple(tensor.shape)} "
                "has not more than these"
            )
        layout = Stream(tensor.shape[dim] - replicated, axis.size, padded or self.auto_pad, replicated)
        if stream is not None and self.gathered:
            self._forget()
        if stream is None:
            self.companions.append(layout)
            if layout.total == 1:  # one value for all tokens, or for the only one: nothing to split
                return tensor
        else:
            self.streams[stream] = layout
            self._layouts.clear()
        real = layout.real
        share = tensor.narrow(dim, replicated + sum(real[: axis.rank]), real[axis.rank])
        missing = layout.shares[axis.rank] - real[axis.rank]
        if missing:
            share = pad(share, [0, 0] * (tensor.ndim - 1 - dim % tensor.ndim) + [0, missing])
        return torch.cat((tensor.narrow(dim, 0, replicated), share), dim) if replicated else share

    def gather(self, tensor: torch.Tensor, dim: int, *, stream: str | None = None, closes: bool = True) -> torch.Tensor:
        """The whole tensor of which every sequence rank holds a share along `dim`, padding removed.

        Args:
            tensor: this rank's share.
            dim: the dimension that is split.
            stream: the parameter name by which it was split; None where only one stream lies on the ranks like this.
            closes: whether attention sees the stream no more.

        Raises:
            ValueError: no stream of this region lies on the ranks like this tensor, or it may be one or another.
        """
        if torch.compiler.is_compiling():
            return _gather_operator(tensor, dim, self.number, stream, closes)  # type: ignore[no-any-return]
        whole, lengths = collectives.all_gather(tensor, dim, self.mesh)
        name, found = self._stream_of(lengths, stream)
        if found.replicated:
            parts = list(whole.split(lengths, dim))
            own = parts[0].narrow(dim, 0, found.replicated)
            shares = [part.narrow(dim, found.replicated, part.shape[dim] - found.replicated) for part in parts]
            whole = torch.cat((own, *shares), dim)
        if closes:
            self.gathered.add(name)
            self._layouts.clear()
        return whole.narrow(dim, 0, found.total)

    def _stream_of(self, lengths: list[int], stream: str | None) -> tuple[str, Stream]:
        """The stream that lies on the ranks in these lengths. All ranks decide alike: all know all lengths."""
        fitting = {
            name: layout
            for name, layout in self.streams.items()
            if layout.held == lengths and stream in (None, name.rpartition(".")[2])
        }
        if not fitting and not self.streams:  # only rotations or masks were split
            fitting = {f"companion {i}": c for i, c in enumerate(self.companions) if c.held == lengths}
        if not fitting:
            split = {name: layout.held for name, layout in self.streams.items()}
            raise ValueError(f"gather of shares {lengths}, but what was split lies on the ranks as {split}")
        if len({layout.total for layout in fitting.values()}) > 1:
            totals = {name: layout.total for name, layout in fitting.items()}
            raise ValueError(
                f"gather of shares {lengths}: these may be of any of the streams {totals}; say which, by "
                "SequenceParallelOutput(..., stream=NAME) or sp_gather(..., stream=NAME)"
            )
        waiting = [name for name in fitting if name not in self.gathered]
        name = (waiting or list(fitting))[-1]
        return name, fitting[name]

    def layout(self, stream: str = "", joint: int = 0, *, gathered: bool = False) -> TokenLayout | None:
        """The tokens of the open region, as attention joins them; None outside one.

        Args:
            stream: the parameter name of the only stream that the attention sees; empty: it joins all.
            joint: tokens in front of them that every rank holds.
            gathered: as it was before anything was gathered.

        Raises:
            ValueError: no such stream is split.
        """
        key = (stream, joint, gathered)
        if key not in self._layouts:
            split = {n: s for n, s in self.streams.items() if gathered or n not in self.gathered}
            if not split:
                return None
            streams = [split[n] for n in sorted(split, key=self._place) if stream in ("", n.rpartition(".")[2])]
            if not streams:
                raise ValueError(f"attention over the stream {stream!r}, but split are only {list(split)}")
            rank = self.mesh.axis("sequence").rank
            joined = TokenLayout(tuple(streams), rank, self.order_known or len(streams) == 1)
            self._layouts[key] = joined.behind(joint)
        return self._layouts[key]

    def _place(self, name: str) -> int:
        return self.places.get(name, len(self.places))

    def leading(self, count: int, stream: str) -> int:
        """How many of the first `count` tokens of a stream this rank holds.

        Raises:
            ValueError: no such stream is split.
            RuntimeError: while a block is traced for compilation, when lengths are not known.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a count of tokens cannot be split while torch.compile traces; do not compile this block"
            )
        layout = self.layout(stream)
        if layout is None:
            raise ValueError(f"the first {count} tokens of {stream!r} are asked for, but it is not split here")
        real = layout.streams[0].real
        return min(max(count - sum(real[: layout.rank]), 0), real[layout.rank])

    def _forget(self) -> None:
        """Nothing is split."""
        self.streams.clear()
        self.gathered.clear()
        self.companions.clear()
        self._layouts.clear()


def sp_active() -> bool:
    """Whether the running forward is that of a parallelised model, so that `sp_shard` and `sp_gather` may be called."""
    return SequenceShards.running() is not None


def sp_shard(tensor: torch.Tensor, dim: int, *, companion: bool = False) -> torch.Tensor:
    """Split `tensor` along `dim` over the sequence ranks, from inside the forward of a parallelised model.

    As in a plan, a floating tensor `(B, S, D)` is a token stream, over which attention spans until it is gathered;
    streams are joined in the order in which they are split. Lengths that the ranks do not divide are split raggedly.

    Args:
        tensor: whole, the same on every rank.
        dim: the dimension to split.
        companion: whether it only goes along with a stream, although it looks like one.

    Raises:
        RuntimeError: no parallelised model's forward is running.
    """
    running = _running_forward("sp_shard")
    is_stream = tensor.ndim == 3 and tensor.is_floating_point() and not companion
    return running.shard(tensor, dim, stream=f"sp_shard.{len(running.streams)}" if is_stream else None)


def sp_gather(tensor: torch.Tensor, dim: int, *, stream: str | None = None, closes: bool = True) -> torch.Tensor:
    """Join the sequence ranks' shares of `tensor` along `dim`, from inside the forward of a parallelised model.

    Args:
        tensor: this rank's share.
        dim: the dimension that is split.
        stream: the parameter name by which a plan split it, or its number among the `sp_shard`ed streams, where two
            streams can lie on the ranks alike.
        closes: whether attention sees the stream no more; False to look at the whole (a mean, say) and go on.

    Raises:
        RuntimeError: no parallelised model's forward is running.
        ValueError: no stream lies on the ranks like this tensor, or it may be one or another.
    """
    return _running_forward("sp_gather").gather(tensor, dim, stream=stream, closes=closes)


def _running_forward(caller: str) -> SequenceShards:
    running = SequenceShards.running()
    if running is None:
        raise RuntimeError(
            f"{caller} was called outside the forward of a parallelised model; "
            "call sp_core.parallelize.parallelize(model, mesh) first and use it inside model.forward, if sp_active()"
        )
    return running


@torch.library.custom_op("sp_core::shard", mutates_args=())
def _shard_operator(
    tensor: torch.Tensor, dim: int, record: int, stream: str | None, padded: bool, replicated: int, rank: int, size: int
) -> torch.Tensor:
    """`rank` and `size` say the shape of the result: compiled graphs are cached on disk by their arguments alone, and a
    rank must not be handed the graph of another."""
    share = SequenceShards.numbered(record).shard(tensor, dim, stream=stream, padded=padded, replicated=replicated)
    return share.clone(memory_format=torch.contiguous_format)


@_shard_operator.register_fake
def _(
    tensor: torch.Tensor, dim: int, record: int, stream: str | None, padded: bool, replicated: int, rank: int, size: int
) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = replicated + Stream(tensor.shape[dim] - replicated, size, padded).share(rank)
    return tensor.new_empty(shape)


@torch.library.custom_op("sp_core::gather", mutates_args=())
def _gather_operator(tensor: torch.Tensor, dim: int, record: int, stream: str | None, closes: bool) -> torch.Tensor:
    whole = SequenceShards.numbered(record).gather(tensor, dim, stream=stream, closes=closes)
    return whole.clone(memory_format=torch.contiguous_format)


@_gather_operator.register_fake
def _(tensor: torch.Tensor, dim: int, record: int, stream: str | None, closes: bool) -> torch.Tensor:
    shape: list[Any] = list(tensor.shape)
    shape[dim] = torch.library.get_ctx().new_dynamic_size()
    return tensor.new_empty(shape)
