"""Every collective of sp_core, except the gang's decisions (`mesh`).

Callers: `region` (gather; once per record, lengths and whether they fit on all ranks), `attention.ulysses` and
`grid_convolution` (exchange), `attention.ring` (shift), `attention.linear` and `tensor_parallel` (sum), `cfg_parallel`
(gather of equal shapes) and `tile_parallel` (gather on rank 0).

Lengths may differ from rank to rank. Callers must know all of them, because a collective with sizes that disagree hangs
or corrupts data instead of failing. On an axis of size 1, which has no group, nothing is sent.

On a GPU each call is asynchronous: NCCL runs it on its own stream, after the work that the current stream has queued.
The current stream waits for the result; the host does not. `traffic` counts what is sent. Lengths and flags go over
gloo (`host_group`), because reading them back from the device would make the host wait for everything in the queue.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from sp_core.mesh import MeshAxis

MOST_MESSAGES = 1000
"""Of one rank in one batch: NCCL takes some 2000 operations in a group. A long video has as many parts."""


def all_to_all(packed: torch.Tensor, send_sizes: list[int], receive_sizes: list[int], axis: MeshAxis) -> torch.Tensor:
    """Exchange one message with every rank of the axis, itself included.

    Args:
        packed: flat; the messages to rank 0, 1, ... one after another.
        send_sizes: elements of each message to send.
        receive_sizes: elements of each message to receive.
        axis: the ranks.

    Returns:
        Flat; the messages from rank 0, 1, ... one after another.
    """
    received = packed.new_empty(sum(receive_sizes))
    if timing := axis.traffic.timing:
        timing.begin("all_to_all")
    dist.all_to_all_single(received, packed, receive_sizes, send_sizes, group=axis.group)
    if timing:
        timing.end()
    axis.traffic.sent.all_to_all += (packed.numel() - send_sizes[axis.rank]) * packed.itemsize
    return received


def all_reduce(tensor: torch.Tensor, axis: MeshAxis) -> torch.Tensor:
    """The sum of all ranks' tensors, in place."""
    if axis.size == 1:
        return tensor
    if torch.compiler.is_compiling():
        _all_reduce_operator(tensor, axis.number)
        return tensor
    if timing := axis.traffic.timing:
        timing.begin("all_reduce")
    dist.all_reduce(tensor, group=axis.group)
    if timing:
        timing.end()
    axis.traffic.sent.all_reduce += axis.share_of_sum * tensor.nbytes
    return tensor


@torch.library.custom_op("sp_core::all_reduce", mutates_args=("tensor",), tags=(torch.Tag.cudagraph_unsafe,))
def _all_reduce_operator(tensor: torch.Tensor, number: int) -> None:
    """Opaque to torch.compile, so that a compiled block counts and times its sums like any other."""
    all_reduce(tensor, MeshAxis.numbered(number))


def all_gather(tensor: torch.Tensor, dim: int, lengths: list[int], axis: MeshAxis) -> torch.Tensor:
    """Concatenate the ranks' tensors along `dim`, in rank order; their lengths along `dim` may differ.

    One gather, padded to the longest share because gloo gathers only equal shapes. Ragged shares differ by at most one
    token, so there is hardly any padding.

    Args:
        tensor: this rank's share.
        dim: the dimension to join.
        lengths: of each rank's share along `dim`, its own included; the same list on all ranks.
        axis: the ranks.
    """
    if axis.size == 1:
        return tensor
    longest = max(lengths)
    local = tensor.movedim(dim, 0)  # ranks' shares are then contiguous in what is gathered
    padded = local.new_empty((longest, *local.shape[1:]))
    padded[: local.shape[0]] = local
    padded[local.shape[0] :] = 0
    gathered = padded.new_empty((axis.size * longest, *local.shape[1:]))
    if timing := axis.traffic.timing:
        timing.begin("gather")
    dist.all_gather_single(gathered, padded, group=axis.group)
    if timing:
        timing.end()
    axis.traffic.sent.gather += (axis.size - 1) * padded.nbytes
    parts = zip(gathered.split(longest), lengths, strict=True)
    # Contiguous, like the output of a module: some forwards view it in another shape.
    return torch.cat([part[:length].movedim(0, dim) for part, length in parts], dim).contiguous()


def all_gather_equal(tensor: torch.Tensor, axis: MeshAxis) -> list[torch.Tensor]:
    """All ranks' tensors, in rank order; they must have the same shape."""
    if axis.size == 1:
        return [tensor]
    gathered = tensor.new_empty((axis.size * tensor.shape[0], *tensor.shape[1:]))
    if timing := axis.traffic.timing:
        timing.begin("gather")
    dist.all_gather_single(gathered, tensor.contiguous(), group=axis.group)
    if timing:
        timing.end()
    axis.traffic.sent.gather += (axis.size - 1) * tensor.nbytes
    return list(gathered.chunk(axis.size))


def gather(tensors: list[torch.Tensor], axis: MeshAxis) -> list[list[torch.Tensor]]:
    """Every rank's tensors, by rank, on the axis's first rank; the others get an empty list.

    Args:
        tensors: any number, of any shapes, but of one dtype on all ranks.
        axis: the ranks.
    """
    if axis.size == 1:
        return [tensors]
    shapes = _all_shapes(tensors, axis)
    if axis.rank:
        _exchange(
            [[dist.P2POp(dist.isend, each.contiguous(), group=axis.group, group_peer=0) for each in tensors]], axis
        )
        axis.traffic.sent.gather += sum(each.nbytes for each in tensors)
        return []
    # tensors[0] exists where it is read: rank 0 gets work first, so if it has none, no rank has
    others = [[tensors[0].new_empty(shape) for shape in shapes[rank]] for rank in range(1, axis.size)]
    _exchange(
        [
            [dist.P2POp(dist.irecv, each, group=axis.group, group_peer=rank) for each in received]
            for rank, received in enumerate(others, 1)
        ],
        axis,
    )
    return [tensors, *others]


def _exchange(messages: list[list[dist.P2POp]], axis: MeshAxis) -> None:
    """Send or receive, in the same batches on both sides.

    As batches: else NCCL would open a communicator of two for each pair of ranks (pytorch#160342).

    Args:
        messages: those of each other rank, in order.
        axis: the ranks.
    """
    if timing := axis.traffic.timing:
        timing.begin("gather")
    each = max(1, MOST_MESSAGES // (axis.size - 1))
    for start in range(0, max(map(len, messages)), each):
        for work in dist.batch_isend_irecv(list(itertools.chain(*(some[start : start + each] for some in messages)))):
            work.wait()
    if timing:
        timing.end()


def all_lengths(length: int, axis: MeshAxis) -> list[int]:
    """Each rank's length."""
    if axis.size == 1:
        return [length]
    lengths = torch.zeros(axis.size, dtype=torch.int64)
    dist.all_gather_single(lengths, torch.tensor([length]), group=axis.host_group)
    return [int(n) for n in lengths.tolist()]


def on_any_rank(flag: bool, axis: MeshAxis) -> bool:
    """Whether the flag is set on any rank of the axis."""
    if axis.size == 1:
        return flag
    word = torch.tensor([int(flag)])
    dist.all_reduce(word, op=dist.ReduceOp.MAX, group=axis.host_group)
    return bool(word.item())


def _all_shapes(tensors: list[torch.Tensor], axis: MeshAxis) -> list[list[list[int]]]:
    """The shapes of every rank's tensors, by rank. Sent as integers: torch would unpickle objects on arrival."""
    own = [number for tensor in tensors for number in (tensor.ndim, *tensor.shape)]
    lengths = all_lengths(len(own), axis)
    padded = torch.zeros(max(1, *lengths), dtype=torch.int64)
    padded[: len(own)] = torch.tensor(own, dtype=torch.int64)
    everyone = padded.new_empty(axis.size * len(padded))
    dist.all_gather_single(everyone, padded, group=axis.host_group)
    return [
        _split_shapes(row.tolist()[:length]) for row, length in zip(everyone.chunk(axis.size), lengths, strict=True)
    ]


def _split_shapes(numbers: list[int]) -> list[list[int]]:
    shapes = []
    while numbers:
        end = 1 + numbers[0]
        shapes.append(numbers[1:end])
        numbers = numbers[end:]
    return shapes


class RingShift:
    """Sends a tensor to the next rank of an axis and receives the previous rank's. Starts on construction.

    Both directions are one batch: with NCCL, ranks that all send first and receive later would wait for each other.

    Args:
        tensor: must not be written to before `wait`.
        receive_shape: of the tensor that the previous rank sends.
        axis: the ranks, at least two.
    """

    def __init__(self, tensor: torch.Tensor, receive_shape: Sequence[int], axis: MeshAxis) -> None:
        self._sent = tensor.contiguous()
        self._received = tensor.new_empty(tuple(receive_shape))
        following, previous = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        self._work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, group=axis.group, group_peer=following),
                dist.P2POp(dist.irecv, self._received, group=axis.group, group_peer=previous),
            ]
        )
        self._traffic = axis.traffic
        self._traffic.sent.ring += self._sent.nbytes

    def wait(self) -> torch.Tensor:
        """The previous rank's tensor. The current stream waits for it; the host does not."""
        if timing := self._traffic.timing:
            timing.begin("ring")
        for work in self._work:
            work.wait()
        if timing:
            timing.end()  # what computation did not hide
        return self._received
