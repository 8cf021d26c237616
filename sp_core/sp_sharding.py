"""Splitting and gathering one tensor, and the record of what is split in the running forward.

`SequenceShards` belongs to one parallelised model. Hooks (`sp_core.hooks`) and attention (`sp_core.attention`) share
it; `sp_shard` and `sp_gather` reach it from inside a forward, for models that shard themselves.

A *region* is the part of a forward between a split and the next gather. The token streams split in it (image, text)
are recorded with their full lengths, so every rank knows every rank's share and attention needs no exchange of sizes.
"""

from contextvars import ContextVar, Token
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from sp_core import collectives
from sp_core.mesh import ParallelMesh

_running: ContextVar["SequenceShards | None"] = ContextVar("running forward", default=None)

MAIN_STREAM = "hidden_states"
"""diffusers' name for the stream that a transformer returns."""


@dataclass(frozen=True)
class Stream:
    """How a sequence of `length` tokens lies on `size` ranks.

    Ragged: as even as can be, the longer shares first. Padded: equal shares, zeros behind the last token. Every rank
    holds at least one token, because model code reshapes with -1 and fails on empty tensors: a stream with fewer
    tokens than ranks is padded in any case.

    Attributes:
        length: tokens, without padding.
        size: ranks.
        padded: whether the shares are equal by padding.
    """

    length: int
    size: int
    padded: bool = False

    @property
    def shares(self) -> list[int]:
        """Tokens on each rank, padding included."""
        if self._is_padded:
            return [-(-self.length // self.size)] * self.size
        share, rest = divmod(self.length, self.size)
        return [share + (rank < rest) for rank in range(self.size)]

    @property
    def real(self) -> list[int]:
        """Tokens on each rank, without padding."""
        left = self.length
        counts = []
        for share in self.shares:
            counts.append(min(share, left))
            left -= counts[-1]
        return counts

    @property
    def _is_padded(self) -> bool:
        return self.padded or self.length < self.size


@dataclass
class SequenceShards:
    """What is split in the running forward of one model.

    Attributes:
        mesh: the groups of the model's gang.
        streams: the token streams of the open region by the name of the split that made them, in the order in which
            attention finds them side by side.
        companions: what else is split in the region and only goes along (masks, rotations).
        order_known: whether the order of the streams is that in which attention joins them.
        expects_attention: whether a region without attention across ranks is a mistake.
        attended: whether the open region has had any.
    """

    mesh: ParallelMesh
    streams: dict[str, Stream] = field(default_factory=dict)
    companions: list[Stream] = field(default_factory=list)
    order_known: bool = True
    expects_attention: bool = False
    attended: bool = False
    _token: Token["SequenceShards | None"] | None = None

    def begin(self) -> None:
        """A forward of the model starts: nothing is split, whatever became of the forward before."""
        self.close_region()
        self._token = _running.set(self)

    def end(self) -> None:
        """The forward is over, by return or by exception."""
        self.close_region()
        if self._token is not None:
            _running.reset(self._token)
            self._token = None

    def shard(self, tensor: torch.Tensor, dim: int, *, stream: str | None = None, padded: bool = False) -> torch.Tensor:
        """This rank's share of `tensor` along `dim`: a view, unless it needs padding.

        Args:
            tensor: whole, the same on every rank.
            dim: the dimension to split.
            stream: the name under which attention and gather know these tokens; None for what only goes along with
                them (masks, rotations).
            padded: equal shares, zeros behind the last token.
        """
        axis = self.mesh.axis("sequence")
        layout = Stream(tensor.shape[dim], axis.size, padded)
        if stream is None:
            self.companions.append(layout)
        else:
            self.streams[stream] = layout
        real = layout.real
        share = tensor.narrow(dim, sum(real[: axis.rank]), real[axis.rank])
        missing = layout.shares[axis.rank] - real[axis.rank]
        if not missing:
            return share
        behind = [0, 0] * (tensor.ndim - 1 - dim % tensor.ndim) + [0, missing]
        return pad(share, behind)

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The whole tensor of which every sequence rank holds a share along `dim`, padding removed.

        Of two streams with the same shares but different padding, `hidden_states` is taken, else the last.

        Raises:
            ValueError: nothing that was split in this region lies on the ranks like this tensor.
            RuntimeError: no attention between split and gather came here: each rank attended only to its own tokens.
        """
        if self.expects_attention and not self.attended and self.mesh.axis("sequence").size > 1:
            raise RuntimeError(
                "no attention of this region went across ranks; an attention backend was chosen that bypasses sp_core "
                "after parallelize (with attention_backend(...), say): leave the one that was active then"
            )
        whole, lengths = collectives.all_gather(tensor, dim, self.mesh)
        main_last = sorted(self.streams, key=lambda name: name.rpartition(".")[2] == MAIN_STREAM)
        layouts = [*self.companions, *(self.streams[name] for name in main_last)]
        fitting = [layout for layout in layouts if layout.shares == lengths]
        if not fitting:
            split = {name: stream.shares for name, stream in self.streams.items()}
            raise ValueError(f"gather of shares {lengths}, but what was split lies on the ranks as {split}")
        return whole.narrow(dim, 0, fitting[-1].length)

    def close_region(self) -> None:
        """Nothing is split any more."""
        self.streams.clear()
        self.companions.clear()
        self.attended = False

    def local_lengths(self) -> list[int]:
        """How many tokens of the open region each sequence rank holds, over all streams; empty outside a region."""
        return [sum(of_rank) for of_rank in zip(*(stream.shares for stream in self.streams.values()), strict=True)]

    def padding_mask(self, device: torch.device) -> torch.Tensor | None:
        """`(L,)`, True for this rank's real tokens of the open region; None where no rank has padding.

        Raises:
            ValueError: it depends on the order of the streams, and that is not known.
        """
        if all(stream.shares == stream.real for stream in self.streams.values()):
            return None
        if len(self.streams) > 1 and not self.order_known:
            lengths = {name: stream.length for name, stream in self.streams.items()}
            raise ValueError(
                f"streams {lengths} need padding on these ranks, and diffusers' _cp_plan does not say in which order "
                "attention joins them; pass plan= with the streams in that order, or use fewer ranks"
            )
        rank = self.mesh.axis("sequence").rank
        spans = [torch.arange(s.shares[rank], device=device) < s.real[rank] for s in self.streams.values()]
        return torch.cat(spans)


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
    running = _running_forward("sp_gather")
    whole = running.gather(tensor, dim)
    running.close_region()
    return whole


def _running_forward(caller: str) -> SequenceShards:
    running = _running.get()
    if running is None:
        raise RuntimeError(
            f"{caller} was called outside the forward of a parallelised model; "
            "call sp_core.parallelize.parallelize(model, mesh) first and use it inside model.forward"
        )
    return running
