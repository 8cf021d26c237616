"""Splitting and gathering one tensor, and the record of what is split in the running forward.

`SequenceShards` belongs to one parallelised model. Hooks (`sp_core.hooks`) and attention (`sp_core.attention`) share
it; `sp_shard` and `sp_gather` reach it from inside a forward, for models that shard themselves.

A *region* is the part of a forward between a split and the gather that ends it. The token streams split in it (image,
text) are recorded with their full lengths, so every rank knows every rank's share and attention exchanges no sizes.

Under `torch.compile` splits and gathers are opaque operators, so that a compiled block keeps one graph and the record
is kept when it runs, not when it is traced.
"""

import itertools
from collections.abc import Callable
from contextvars import ContextVar, Token
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

MAIN_STREAM = "hidden_states"
"""diffusers' name for the stream that a transformer returns."""


@dataclass(eq=False)
class SequenceShards:
    """What is split in the running forward of one model.

    Attributes:
        mesh: the groups of the model's gang.
        local_attention: attention outside a region: `(query, key, value, mask, scale)` to output.
        streams: the token streams of the region by the name of the split that made them, in the order in which
            attention finds them side by side.
        companions: what else is split in the region and only goes along (masks, rotations).
        is_open: whether attention is across ranks now. A region that was gathered stays on record until the next split,
            since it may have more to gather.
        order_known: whether the order of the streams is that in which attention joins them.
        expects_attention: whether a region without attention across ranks is a mistake.
        attended: whether the region has had any.
        number: by which operators find this record.
    """

    mesh: ParallelMesh
    local_attention: Callable[..., torch.Tensor] = kernels.local_attention
    streams: dict[str, Stream] = field(default_factory=dict)
    companions: list[Stream] = field(default_factory=list)
    is_open: bool = False
    order_known: bool = True
    expects_attention: bool = False
    attended: bool = False
    number: int = field(default_factory=lambda: next(_numbers))
    _layouts: dict[tuple[str, int], TokenLayout] = field(default_factory=dict)
    _token: Token["SequenceShards | None"] | None = None

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
        self._token = _running.set(self)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """The forward is over, by return or by exception."""
        self._forget()
        if self._token is not None:
            _running.reset(self._token)
            self._token = None

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
            return _shard_operator(  # type: ignore[no-any-return]
                tensor, dim, self.number, stream, padded, replicated, axis.rank, axis.size
            )
        if replicated and not 0 < replicated < tensor.shape[dim]:
            raise ValueError(
                f"{replicated} tokens are to stay whole, but dimension {dim} of shape {tuple(tensor.shape)} "
                "has not more than these"
            )
        layout = Stream(tensor.shape[dim] - replicated, axis.size, padded, replicated)
        if not self.is_open:
            self._forget()
            self.is_open = True
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

    def gather(self, tensor: torch.Tensor, dim: int, *, closes: bool) -> torch.Tensor:
        """The whole tensor of which every sequence rank holds a share along `dim`, padding removed.

        Of two streams with the same shares but different padding, `hidden_states` is taken, else the last.

        Args:
            tensor: this rank's share.
            dim: the dimension that is split.
            closes: whether the region ends here.

        Raises:
            ValueError: nothing that was split in this region lies on the ranks like this tensor.
            RuntimeError: no attention between split and gather came here: each rank attended only to its own tokens.
        """
        if torch.compiler.is_compiling():
            return _gather_operator(tensor, dim, self.number, closes)  # type: ignore[no-any-return]
        if self.expects_attention and not self.attended and self.mesh.axis("sequence").size > 1:
            raise RuntimeError(
                "no attention of this region went across ranks; an attention backend was chosen that bypasses sp_core "
                "after parallelize (with attention_backend(...), say): leave the one that was active then"
            )
        whole, lengths = collectives.all_gather(tensor, dim, self.mesh)
        main_last = sorted(self.streams, key=lambda name: name.rpartition(".")[2] == MAIN_STREAM)
        layouts = [*self.companions, *(self.streams[name] for name in main_last)]
        fitting = [layout for layout in layouts if layout.held == lengths]
        if not fitting:
            split = {name: stream.held for name, stream in self.streams.items()}
            raise ValueError(f"gather of shares {lengths}, but what was split lies on the ranks as {split}")
        found = fitting[-1]
        if found.replicated:
            parts = list(whole.split(lengths, dim))
            own = parts[0].narrow(dim, 0, found.replicated)
            shares = [part.narrow(dim, found.replicated, part.shape[dim] - found.replicated) for part in parts]
            whole = torch.cat((own, *shares), dim)
        if closes:
            self.is_open = False
        return whole.narrow(dim, 0, found.replicated + found.length)

    def layout(self, stream: str = "", joint: int = 0) -> TokenLayout | None:
        """The tokens of the open region, as attention joins them; None outside one.

        Args:
            stream: the parameter name of the only stream that the attention sees; empty: it joins all.
            joint: tokens in front of them that every rank holds.

        Raises:
            ValueError: no such stream is split.
        """
        if not self.is_open or not self.streams:
            return None
        if (stream, joint) not in self._layouts:
            streams = [s for name, s in self.streams.items() if stream in ("", name.rpartition(".")[2])]
            if not streams:
                raise ValueError(f"attention over the stream {stream!r}, but split are only {list(self.streams)}")
            rank = self.mesh.axis("sequence").rank
            joined = TokenLayout(tuple(streams), rank, self.order_known or len(streams) == 1)
            self._layouts[stream, joint] = joined.behind(joint)
        return self._layouts[stream, joint]

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
        self.companions.clear()
        self._layouts.clear()
        self.is_open = self.attended = False


def sp_active() -> bool:
    """Whether the running forward is that of a parallelised model, so that `sp_shard` and `sp_gather` may be called."""
    return SequenceShards.running() is not None


def sp_shard(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Split `tensor` along `dim` over the sequence ranks, from inside the forward of a parallelised model.

    The tensor is taken for a token stream: attention until the next `sp_gather` spans it. Lengths that the number of
    ranks does not divide are split raggedly.

    Raises:
        RuntimeError: no parallelised model's forward is running.
    """
    running = _running_forward("sp_shard")
    return running.shard(tensor, dim, stream=f"sp_shard.{len(running.streams)}")


def sp_gather(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Join the sequence ranks' shares of `tensor` along `dim`, from inside the forward of a parallelised model.

    Raises:
        RuntimeError: no parallelised model's forward is running.
    """
    return _running_forward("sp_gather").gather(tensor, dim, closes=True)


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
def _gather_operator(tensor: torch.Tensor, dim: int, record: int, closes: bool) -> torch.Tensor:
    whole = SequenceShards.numbered(record).gather(tensor, dim, closes=closes)
    return whole.clone(memory_format=torch.contiguous_format)


@_gather_operator.register_fake
def _(tensor: torch.Tensor, dim: int, record: int, closes: bool) -> torch.Tensor:
    shape: list[Any] = list(tensor.shape)
    shape[dim] = torch.library.get_ctx().new_dynamic_size()
    return tensor.new_empty(shape)
