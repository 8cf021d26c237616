"""Part 3: attention by kernel, shape and mask.

Milliseconds are the median of five rounds; TFLOP/s count 4 x B x H x S x K x D. "first" is the first call with a shape:
some kernels make a plan for each. "error" is the largest difference of the first rows from plain arithmetic in fp32, in
units of max(1, max|reference|); above 8 epsilon of the dtype the row has failed. At the end is what
`sp_core.cuda_kernels` would choose.
"""

import contextlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from sp_core import cuda_kernels, kernels
from sp_core.verify.divergence import error
from tests.benchmarks.gpu import machine, timing
from tests.benchmarks.gpu.part import LeftOut, Part, release

ROWS = 64
"""Queries that are compared to plain arithmetic."""

OPTIONAL = {"flash-attn-2": "flash_attn", "flash-attn-3": "flash_attn_interface"}
"""Kernels that come in packages of their own."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Attention of `queries` to `keys` tokens."""

    name: str
    queries: int
    keys: int
    heads: int
    head_size: int = 128
    masked: bool = False

    @property
    def flops(self) -> int:
        """Of both products."""
        return 4 * self.queries * self.keys * self.heads * self.head_size


def shapes(fake: bool) -> list[Shape]:
    """The shapes of the table, cheap ones first."""
    if fake:
        return [Shape("small", 96, 96, 6, 16), Shape("ring 2 of it", 48, 48, 6, 16), Shape("text", 96, 80, 6, 16)]
    qwen = 4096 + 128
    found = [
        *(Shape(f"Qwen-Image 1024x1024, Ulysses {n}", qwen, qwen, 24 // n) for n in (8, 4, 2)),
        *(Shape(f"Qwen-Image 1024x1024, ring {n}", qwen // n, qwen // n, 24) for n in (8, 4, 2)),
        Shape("Qwen-Image 1024x1024", qwen, qwen, 24),
        Shape("Z-Image 1024x1024", qwen, qwen, 30),
        Shape("Flux.1 1024x1024", 4608, 4608, 24),
        Shape("Wan text", 32760, 512, 40),
    ]
    return [*found, *(Shape(f"Wan 832x480x81, Ulysses {n}", 32760, 32760, 40 // n) for n in (8, 4, 2, 1))]


def masked_shapes(fake: bool) -> list[Shape]:
    """Those with a mask that hides the last tokens of a text."""
    if fake:
        return [Shape("small, text mask", 96, 96, 6, 16, masked=True)]
    qwen = 4096 + 128
    return [
        *(Shape(f"Qwen-Image, text mask, Ulysses {n}", qwen, qwen, 24 // n, masked=True) for n in (8, 4, 2, 1)),
        Shape("Qwen-Image, text mask, ring 4", qwen // 4, qwen // 4, 24, masked=True),
    ]


def run(part: Part) -> None:
    """Write the tables."""
    device, dtype = part.device, part.dtype
    part.table.begin("Matrix products", "What the card reaches without attention.", ("product", "TFLOP/s", "of peak"))
    card = "" if part.fake else torch.cuda.get_device_name(device)
    best = [0.0]

    def gemm(side: int) -> Sequence[object]:
        reached = timing.best_gemm(device, dtype, side)
        best[0] = max(best[0], reached)
        return reached / 1e12, _share(reached, machine.peak(card))

    for side in (128, 256) if part.fake else (4096, 8192):
        part.row((f"{side} x {side} x {side}",), partial(gemm, side))
    peak = machine.peak(card) or best[0] or None
    said = f"{dtype}, batch 1. Peak: {'the best product above' if not machine.peak(card) else card}."
    part.table.begin(
        "Attention", said, ("shape", "mask", "S x K x H x D", "kernel", "ms", "TFLOP/s", "of peak", "first ms", "error")
    )
    if not part.fake:  # so that no row pays for the choice, or for loading libraries
        with contextlib.suppress(RuntimeError):  # the rows then say what is wrong with each
            cuda_kernels.choose(device, dtype, shapes(False)[0].head_size)
    for shape in [*shapes(part.fake), *masked_shapes(part.fake)]:
        for name, attend in _kernels(device, shape.masked).items():
            size = f"{shape.queries} x {shape.keys} x {shape.heads} x {shape.head_size}"
            head = (shape.name, "text" if shape.masked else "none", size, name)
            part.row(head, partial(_measure, part, shape, name, attend, peak))
            release(device)
    part.table.begin("Choice", "By `sp_core.cuda_kernels`, of what is right here.", ("head size", "kernel"))
    for head_size in (16,) if part.fake else (64, 128):
        part.row((head_size,), partial(_choice, part, head_size))


def _choice(part: Part, head_size: int) -> Sequence[object]:
    if part.fake:
        return (cuda_kernels.in_use(part.device),)
    return (cuda_kernels.fastest(part.device, part.dtype, head_size),)


def _kernels(device: torch.device, masked: bool) -> Mapping[str, Attend]:
    """All that can attend on this device: ours by name, ours as called, and torch's own choice."""
    with_lse: Attend = lambda q, k, v, mask: kernels.attention_with_lse(q, k, v, mask)[0]  # noqa: E731
    called: dict[str, Attend] = {"sp_core, as called": kernels.attention}
    torchs: dict[str, Attend] = {"torch's choice": _torch}
    if masked:
        return torchs | called | {"sp_core, with log-sum-exp": with_lse}
    if device.type == "cpu":
        return torchs | called | {"torch flash for CPU": with_lse}
    # The kernels first: who comes later with the same shape finds their plans.
    return {name: _without_mask(kernel) for name, kernel in cuda_kernels.KERNELS.items()} | torchs | called


def _without_mask(kernel: cuda_kernels.Kernel) -> Attend:
    return lambda query, key, value, mask: kernel(query, key, value, None)[0]


def _torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@torch.no_grad()
def _measure(part: Part, shape: Shape, name: str, attend: Attend, peak: float | None) -> Sequence[object]:
    if name in OPTIONAL and importlib.util.find_spec(OPTIONAL[name]) is None:
        raise LeftOut(f"{OPTIONAL[name]} is not installed")
    device, dtype = part.device, part.dtype
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, shape.heads, shape.head_size, generator=generator, device=device, dtype=dtype)
        for tokens in (shape.queries, shape.keys, shape.keys)
    )
    mask = _mask(shape, device, dtype) if shape.masked else None
    first = timing.once(lambda: attend(query, key, value, mask), device)
    wrong = error(attend(query, key, value, mask)[:, :ROWS], _plainly(query[:, :ROWS], key, value, mask))
    if not wrong <= 8 * torch.finfo(dtype).eps:
        raise ValueError(f"the answer is wrong by {wrong:.1e}")
    took = timing.seconds(lambda: attend(query, key, value, mask), device, 0.01 if part.fake else 0.1)
    reached = shape.flops / took
    return took * 1e3, reached / 1e12, _share(reached, peak), first * 1e3, f"{wrong:.1e}"


def _mask(shape: Shape, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """As the blocks get it: additive, alike for all heads and queries; the last 48 tokens are hidden."""
    mask = torch.zeros(1, 1, 1, shape.keys, device=device, dtype=dtype)
    mask[..., -48:] = float("-inf")
    return mask


def _plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = torch.einsum("bshd,bkhd->bhsk", q.float(), k.float()) / math.sqrt(q.shape[3])
    scores = scores if mask is None else scores + mask.float()
    return torch.einsum("bhsk,bkhd->bshd", scores.softmax(dim=-1), v.float())


def _share(reached: float, peak: float | None) -> str:
    return f"{reached / peak:.0%}" if peak else "-"
