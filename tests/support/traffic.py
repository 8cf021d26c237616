"""What one rank sends in a guided step: counted, and by arithmetic on the model's shape alone.

`Meter` counts every call that reaches a process group inside its block, whoever makes it. `predicted` computes from
layers, heads, tokens and dtype how much that should be. Both give bytes by kind of exchange; `tests.sp_core.test_bytes`
and `tests.benchmarks.layouts` compare them.

Bytes that a rank sends, by algorithm, for P ranks:

    exchange    all-to-all: the messages to other ranks; the one to itself does not count
    shift       of a ring: what goes to the next rank
    sum         all-reduce: 2 (P-1)/P of the tensor, the ring algorithm's, whatever the backend does with small ones
    gather      all-gather: the own share to each of the P-1 others, padded as it is sent
    integers    any of these for decisions and lengths: no tensor of the model

What the arithmetic assumes, for a block of H heads of D on s tokens with e bytes an element, where t ranks share the
weights, U trade heads and R form the ring:

- Tokens and heads. Each stream is split on its own over all U R ranks, as evenly as possible, the longer shares first;
  a stream with fewer tokens than ranks is padded to one token each, but attention leaves the padding out, unless the
  caller gives a mask or a rank would have no token left. Heads: H / t, in the largest equal shares that
  suffice, so that the last ranks of U may have fewer. No grouped queries.
- Ulysses: three lanes (query, key, value) to where a head is, one lane back. Even: 4 (sHD/t) e (U-1) / (R U^2).
- Ring: keys and values of every chunk but the next rank's. Even: 2 (sHD/t) e (R-1) / (R U).
- A key mask (the caller's, or one that hides padding where it is not left out) travels with the tokens, in multiples of
  8 elements a token, so that rows stay aligned: in Ulysses for the whole batch, in the ring for each row of it.
- Tensor parallelism: one sum of (tokens of this rank) x HD for each row-wise layer that a stream passes, and one fp32
  number a token for each norm over the heads of all ranks. Even: 2 sums a stream are 4 sHD e (t-1)/t a block.
- After the blocks the last stream's predicted tokens are gathered once, padded to the longest share.
- Modulation that ranks share: each computes some of the layers, the widest first, each to the rank with the least, and
  sends the others their one row a sample, padded to the most that a rank has: first among the tensor ranks, then what
  these have together among the sequence ranks. Even, for a width of n: n e (t U R - 1) / (t U R).
- Guidance: two branches. On two groups each runs one forward and both exchange their predictions; else two forwards.
- The first forward also asks once for each attention across ranks whether it fits on all (a sum of 8 bytes), and at
  the gather whether all have the lengths that the record says (8 bytes a rank). The second branch is as long.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from sp_core.degrees import ParallelDegrees

Bytes = Counter[str]
"""By kind of exchange; whole numbers or fractions."""

_SILENT = {"recv_", "barrier", "wait_tensor", "_wrap_tensor_autograd"}
"""Calls that send nothing, or nothing that counts."""


class Meter(TorchDispatchMode):
    """Counts in `sent` what this rank sends inside the block, and the calls; raises at one that it cannot count."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Bytes = Counter()
        self.calls = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, dist.tensor.DTensor) for kind in types):
            return NotImplemented  # what it is made of comes here again
        if "c10d" in call.namespace:
            self._count(call._opname, args)
        return call(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in _SILENT:
            return
        if name == "alltoall_base_":
            tensor, group, sizes = args[1], dist.ProcessGroup.unbox(args[2]), args[4]
            own = sizes[group.rank()] * math.prod(tensor.shape[1:]) if sizes else tensor.numel() // group.size()
            kind, elements = "exchange", Fraction(tensor.numel() - own)
        elif name == "send":
            (tensor,) = args[0]
            kind, elements = "shift", Fraction(tensor.numel())
        elif name in ("allreduce_", "all_reduce"):
            boxed = name == "allreduce_"
            tensor = args[0][0] if boxed else args[0]
            ranks = (dist.ProcessGroup.unbox(args[1]) if boxed else _resolve_process_group(args[2])).size()
            kind, elements = "sum", Fraction(2 * (ranks - 1) * tensor.numel(), ranks)
        elif name == "_allgather_base_":
            tensor, group = args[1], dist.ProcessGroup.unbox(args[2])
            kind, elements = "gather", Fraction((group.size() - 1) * tensor.numel())
        else:
            raise NotImplementedError(f"the traffic of {name} is not counted; say here what it sends")
        self.calls += 1
        self.sent[kind if tensor.is_floating_point() else "integers"] += elements * tensor.element_size()


@dataclass(frozen=True)
class Shape:
    """Everything about a forward that decides how much is sent.

    Attributes:
        layers: blocks.
        heads: of attention.
        head_size: features of a head.
        out: features of a predicted token.
        split: tokens of each stream that is split; the last one is predicted.
        row_layers: row-wise layers of a block that each split token passes.
        norms: norms over all heads of a block that each split token passes.
        whole: tokens of a text that every rank holds, with one norm over all heads in each block.
        batch: samples.
        itemsize: bytes of an element.
        masked: the caller gives a mask.
        modulation: how many features each layer makes whose work is shared out among the ranks.
    """

    layers: int
    heads: int
    head_size: int
    out: int
    split: tuple[int, ...]
    row_layers: int
    norms: int = 0
    whole: int = 0
    batch: int = 1
    itemsize: int = 4
    masked: bool = False
    modulation: tuple[int, ...] = ()


def of_qwen_image(config: Mapping[str, Any], text: int, image: int, **rest: Any) -> Shape:
    """Text and image are split, joined in attention, and pass two row-wise layers each: out of attention, out of the
    feed-forward. A layer of each block modulates each stream: shift, scale and gate, twice."""
    out = config["patch_size"] ** 2 * config["out_channels"]
    layers, heads, head_size = _sizes(config)
    modulation = (6 * heads * head_size,) * (2 * layers)
    return Shape(layers, heads, head_size, out, (text, image), row_layers=2, modulation=modulation, **rest)


def of_wan(config: Mapping[str, Any], text: int, video: int, **rest: Any) -> Shape:
    """The video is split and passes three row-wise layers: out of its attention, out of that to the text, out of the
    feed-forward. Norms over all heads: its query and key, its query for the text; and the text's key."""
    frames, height, width = config["patch_size"]
    out = frames * height * width * config["out_channels"]
    return Shape(*_sizes(config), out, (video,), row_layers=3, norms=3, whole=text, **rest)


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    return config["num_layers"], config["num_attention_heads"], config["attention_head_dim"]


def predicted(shape: Shape, degrees: ParallelDegrees, rank: int, *, first: bool = False) -> Bytes:
    """Bytes that a rank sends in one guided step.

    Args:
        shape: of the forward; both branches are alike.
        degrees: the layout; at most two groups for guidance.
        rank: counted with tensor parallelism innermost, then Ulysses, ring, guidance.
        first: the model has not run before.
    """
    groups = degrees.cfg_parallel_size
    assert groups <= 2
    forwards = 2 // groups
    forward = _forward(shape, degrees, rank)
    sent: Bytes = Counter({kind: forwards * count for kind, count in forward.items()})
    prediction = shape.batch * shape.split[-1] * shape.out * shape.itemsize
    sent["gather"] += (groups - 1) * prediction
    if first:
        ranks = degrees.sequence_parallel_size
        sent["integers"] += shape.layers * _summed(8, ranks) + (ranks - 1) * 8
    return sent


def _forward(shape: Shape, degrees: ParallelDegrees, rank: int) -> Bytes:
    weights, ulysses, ring = degrees.tensor_parallel_size, degrees.ulysses_degree, degrees.ring_degree
    ranks = ulysses * ring
    at = rank // weights % ranks
    my_column, my_row = at % ulysses, at // ulysses

    shares = [_tokens(length, ranks) for length in shape.split]
    held = [sum(of_rank) for of_rank in zip(*shares, strict=True)]
    real = [sum(of_rank) for of_rank in zip(*(_real(length, ranks) for length in shape.split), strict=True)]
    masked = shape.masked or not all(real)
    seen = held if masked else real  # tokens of each rank in attention
    chunks = [sum(seen[row * ulysses : (row + 1) * ulysses]) for row in range(ring)]
    heads = shape.heads // weights
    largest = -(-heads // ulysses)
    columns = [max(0, min(largest, heads - column * largest)) for column in range(ulysses)]
    lane = shape.batch * shape.head_size  # elements of one head of a token

    others = [column for column in range(ulysses) if column != my_column]
    mask_row = -(-shape.batch // 8) * 8 if masked else 0
    there = sum(seen[at] * (3 * columns[column] * lane + mask_row) for column in others)
    back = sum(seen[my_row * ulysses + column] * columns[my_column] * lane for column in others)
    passed_on = sum(chunks) - chunks[(my_row + 1) % ring] if ring > 1 else 0
    shift = passed_on * (2 * columns[my_column] * lane + (8 * shape.batch if masked else 0))

    rows = shape.row_layers * held[at] * shape.heads * shape.head_size * shape.itemsize
    norms = (shape.norms * held[at] + shape.whole) * 4
    gathered = max(shares[-1]) * shape.batch * shape.out * shape.itemsize
    modulated = _most(shape.modulation, weights * ranks) * shape.batch * shape.itemsize
    return Counter(
        {
            "exchange": shape.layers * (there + back) * shape.itemsize,
            "shift": shape.layers * shift * shape.itemsize,
            "sum": shape.layers * shape.batch * _summed(rows + norms, weights),
            "gather": (ranks - 1) * gathered + (weights - 1 + weights * (ranks - 1)) * modulated,
        }
    )


def _tokens(length: int, ranks: int) -> list[int]:
    """Tokens of a stream on each rank."""
    return [max(1, length // ranks + (rank < length % ranks)) for rank in range(ranks)]


def _real(length: int, ranks: int) -> list[int]:
    """The same without padding."""
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]


def _most(widths: tuple[int, ...], ranks: int) -> int:
    """Features that the rank with the most of them makes."""
    made = [0] * ranks
    for width in sorted(widths, reverse=True):
        made[made.index(min(made))] += width
    return max(made)


def _summed(size: int, ranks: int) -> Fraction:
    """What a rank sends to sum `size` bytes."""
    return Fraction(2 * (ranks - 1) * size, ranks)
