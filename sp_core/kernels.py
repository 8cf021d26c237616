"""Attention on one device. The only place that picks a kernel.

Shapes: B batch, S query and K key tokens, H heads, D head size; q `(B, S, H, D)`, k and v `(B, K, heads, D)`, whose
heads divide H: each serves consecutive heads of the queries.
Masks are additive (-inf hides a key), broadcastable to `(B, H, S, K)`; `local_attention` takes a model's own.

On CPU: torch's flash attention for CPU. On CUDA: torch's memory-efficient kernel for attention with a mask or in fp32,
else the fastest of several. `choose` tries these once on the device, drops those that are missing or give a wrong
answer, and logs what it found.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn.functional import scaled_dot_product_attention

from sp_core import torch_private

_logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)

WithLse = tuple[torch.Tensor, torch.Tensor]
"""An output `(B, S, H, D)` and its log-sum-exp `(B, S, H)`."""


@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys.

    Attributes:
        output: `(B, S, H, D)`; 0 in rows without a visible key.
        lse: `(B, S, H)`, the log of the softmax's denominator, in fp32; -inf in these rows.
        base: to be added to `lse` for its true value, broadcastable to it; None: nothing. Kept apart, because a mask of
            -1e4 or the least number of its type that hides all of the keys would swallow the digits of `lse`.
    """

    output: torch.Tensor
    lse: torch.Tensor
    base: torch.Tensor | None = None


SWALLOWS = -(2.0**29)
"""A mask this low leaves nothing of a score in fp32: scores below 32 are less than half of its last digit."""

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], WithLse]
"""q, k, v and the scale."""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention, `(B, S, H, D)`; rows without a visible key are zero.

    Args:
        query: `(B, S, H, D)`.
        key: `(B, K, H, D)`.
        value: `(B, K, H, D)`.
        mask: additive, broadcastable to `(B, H, S, K)`.
        scale: of the scores; None is 1/sqrt(D).
    """
    key, value = _for_all_heads(query, key, value)
    if mask is None and _has_choice(query) and not torch.compiler.is_compiling():
        return choose(query.device, query.dtype, query.shape[3])(query, key, value, scale)[0]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # heads first, as views
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


def local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """As `attention`, with a mask as models have it: boolean (True takes part) or additive, `(B, K)` or broadcastable
    to `(B, H, S, K)`."""
    return attention(query, key, value, mask[:, None, None] if mask is not None and mask.ndim == 2 else mask, scale)


def partial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> Partial:
    """Attention over some of the keys, to be merged with that over the others. Arguments as for `attention`.

    The kernel gets the mask without its peak, so that `lse` keeps its digits. Attention over all keys at once adds the
    whole mask to the scores, where the least number of a type swallows them: such rows average what they hide. So do
    they here, by queries of 0; a NaN in them stays one.
    """
    if mask is None:
        return Partial(*attention_with_lse(query, key, value, None, scale))
    peak = mask.amax(dim=-1, keepdim=True)
    shifted = mask - peak.masked_fill(torch.isneginf(peak), 0)
    query = query * (peak > SWALLOWS).transpose(1, 2)
    return Partial(*attention_with_lse(query, key, value, shifted, scale), peak.float().squeeze(-1).transpose(1, 2))


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> WithLse:
    """Softmax attention and the log of its denominator. Arguments as for `attention`.

    Returns:
        The output `(B, S, H, D)`, and the log of the softmax's denominator `(B, S, H)` in fp32. Rows without a visible
        key have output 0 and log -inf; the kernels themselves return NaN or 0 there, which would poison a merge.
    """
    key, value = _for_all_heads(query, key, value)
    if mask is None and _has_choice(query):
        return choose(query.device, query.dtype, query.shape[3])(query, key, value, scale)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if query.device.type == "cpu":
        output, lse = torch_private.flash_cpu(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    else:
        bias = None if mask is None else _aligned(mask).expand(*query.shape[:3], key.shape[2])
        output, lse, *_ = torch_private.efficient_cuda(query, key, value, bias, True, 0.0, False, scale=scale)
        lse = lse[..., : query.shape[2]]  # padded to whole tiles
    output, lse = output.transpose(1, 2), lse.transpose(1, 2)
    if mask is not None:
        blind = torch.isneginf(mask).all(dim=-1).transpose(1, 2)  # (B, S, H) or broadcastable to it
        lse = lse.masked_fill(blind, float("-inf"))
        output = output.masked_fill(blind.unsqueeze(-1), 0)
    return output, lse


def merge(one: Partial, other: Partial) -> Partial:
    """Attention over two sets of keys from attention over each, in fp32.

    A row that sees no key of one set takes the other's output unchanged; a row that sees none of either is 0.
    """
    one_lse, other_lse, base = _on_one_base(one, other)
    both = torch.logaddexp(one_lse, other_lse)
    reference = both.masked_fill(torch.isneginf(both), 0)  # exp(-inf - 0) is 0, where exp(-inf + inf) would be NaN
    weight, other_weight = (torch.exp(lse - reference).unsqueeze(-1) for lse in (one_lse, other_lse))
    return Partial(one.output.float() * weight + other.output.float() * other_weight, both, base)


def _on_one_base(one: Partial, other: Partial) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Both logs, relative to the higher of their bases."""
    if one.base is None or other.base is None:
        return one.lse, other.lse, None
    base = torch.maximum(one.base, other.base)
    floor = base.masked_fill(torch.isneginf(base), 0)
    return one.lse + (one.base - floor), other.lse + (other.base - floor), base


def _for_all_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values repeated, so that each head of the queries has its own."""
    repeats = query.shape[2] // key.shape[2]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)


def _aligned(mask: torch.Tensor) -> torch.Tensor:
    """The same mask in rows of a multiple of 16 elements, as torch's memory-efficient kernel needs it."""
    keys = mask.shape[-1]
    rows = mask.new_zeros((*mask.shape[:-1], -(-keys // 16) * 16))
    rows[..., :keys] = mask
    return rows[..., :keys]


def _has_choice(query: torch.Tensor) -> bool:
    return query.device.type == "cuda" and query.dtype in HALF


def _torch_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> WithLse:
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output, lse, *_ = torch_private.flash_cuda(*heads_first, 0.0, False, False, scale=scale)
    return output.transpose(1, 2), lse.transpose(1, 2)


def _torch_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> WithLse:
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output, lse, *_ = torch_private.cudnn_cuda(*heads_first, None, True, 0.0, False, False, scale=scale)
    return output.transpose(1, 2), lse.reshape(lse.shape[:3]).transpose(1, 2)


def _flash_attn_2(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> WithLse:
    from flash_attn import flash_attn_func  # only here: the package is optional, and tried like any kernel

    output, lse, *_ = flash_attn_func(query, key, value, softmax_scale=scale, return_attn_probs=True)
    return output, lse.transpose(1, 2)


def _flash_attn_3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> WithLse:
    from flash_attn_interface import flash_attn_func  # only here: optional as well

    output, lse, *_ = flash_attn_func(query, key, value, softmax_scale=scale, return_attn_probs=True)
    return output, lse.transpose(1, 2)


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "torch flash": _torch_flash,
        "torch cuDNN": _torch_cudnn,
        "flash-attn 2": _flash_attn_2,
        "flash-attn 3": _flash_attn_3,
    }
)
"""What there is to choose from on CUDA, without a mask, in half precision."""


def name_of_choice(device: torch.device, dtype: torch.dtype, head_size: int | None) -> str:
    """The kernels, to be reported at start: without a mask, and with one. Chooses, if there is a choice."""
    if device.type == "cpu":
        return "torch flash for CPU"
    if dtype not in HALF or head_size is None:
        return "torch memory-efficient" if dtype not in HALF else "the fastest at the first call"
    kernel = choose(device, dtype, head_size)
    name = next(name for name, each in KERNELS.items() if each is kernel)
    return f"{name}; with a mask, torch memory-efficient"


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """The fastest kernel that is installed and right. Tried once per device, dtype and head size, and logged.

    Raises:
        RuntimeError: no kernel is.
    """
    found = try_kernels(KERNELS, device, dtype, head_size)
    for name, line in found.items():
        said = f"{line * 1e6:.0f} us" if isinstance(line, float) else line
        _logger.info("attention on %s in %s, head size %d, by %s: %s", device, dtype, head_size, name, said)
    seconds = {name: line for name, line in found.items() if isinstance(line, float)}
    if not seconds:
        raise RuntimeError(f"no attention kernel works on {device} in {dtype} with head size {head_size}: {found}")
    return KERNELS[min(seconds, key=lambda name: seconds[name])]


def try_kernels(
    kernels: Mapping[str, Kernel], device: torch.device, dtype: torch.dtype, head_size: int, tokens: int = 4096
) -> dict[str, float | str]:
    """Seconds of each kernel, or why it cannot be used.

    A kernel is right if output and log-sum-exp agree with plain arithmetic in fp32, within the precision of `dtype`.
    """
    shape = (1, tokens, 8, head_size)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    few = slice(0, 256)
    reference = _plainly(query[:, few], key, value)
    found: dict[str, float | str] = {}
    for name, kernel in kernels.items():
        try:
            outcome = kernel(query, key, value, None)
            wrong = [_error(ours[:, few], theirs) for ours, theirs in zip(outcome, reference, strict=True)]
            if not max(wrong) <= 8 * torch.finfo(dtype).eps:
                found[name] = f"is wrong by {max(wrong):.1e}"
            else:
                found[name] = _seconds(lambda kernel=kernel: kernel(query, key, value, None), device)  # type: ignore[misc]
        except Exception as error:  # it is not installed, or not for this device
            found[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return found


def _plainly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> WithLse:
    scores = torch.einsum("bshd,bkhd->bshk", query.float(), key.float()) / math.sqrt(query.shape[3])
    lse = scores.logsumexp(dim=-1)
    return torch.einsum("bshk,bkhd->bshd", (scores - lse.unsqueeze(-1)).exp(), value.float()), lse


def _error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.float() - reference).abs().max()) / max(1.0, float(reference.abs().max()))


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The shortest of several runs."""
    least = math.inf
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - began)
    return least
