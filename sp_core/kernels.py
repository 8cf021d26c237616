"""Attention on one device.

Shapes: B batch, S query and K key tokens, H heads, D head size; q `(B, S, H, D)`, k and v `(B, K, heads, D)`. The
    number
of their heads divides H; each serves consecutive heads of the queries. Masks are additive (-inf hides a key),
broadcastable to `(B, H, S, K)`; `local_attention` takes a model's own.

On CPU: torch's flash attention for CPU. On CUDA: torch's memory-efficient kernel for attention with a mask or in fp32,
else the kernel that `sp_core.cuda_kernels` says.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from sp_core import torch_private
from sp_core.cuda_kernels import HALF, HEAD_SIZES, WithLse, choose


@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys.

    Attributes:
        output: `(B, S, H, D)`; 0 in rows without a visible key.
        lse: `(B, S, H)`, the log of the softmax's denominator, in fp32; -inf in these rows.
        base: must be added to `lse` for its true value, broadcastable to it; None: nothing. It is kept apart, because a
            mask that hides all keys with -1e4, or with the least number of its type, would swallow the digits of `lse`.
    """

    output: torch.Tensor
    lse: torch.Tensor
    base: torch.Tensor | None = None


SWALLOWS = -(2.0**29)
"""A mask this low swallows any score in fp32: scores below 32 are less than half of its last digit."""


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
    size = query.shape[3]
    if _must_pad(query):
        return attention(_padded(query), _padded(key), _padded(value), mask, scale or size**-0.5)[..., :size]
    key, value = _for_all_heads(query, key, value)
    if mask is None and _has_choice(query) and not torch.compiler.is_compiling():
        return choose(query.device, query.dtype, query.shape[3])(query, key, value, scale)[0]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # heads first, as views
    if mask is not None and mask.stride(-1) != 1:  # as after an exchange: torch has no fused kernel for it on CUDA
        mask = mask.contiguous()
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
    whole mask to the scores. The least number of a type swallows them, so a row that is hidden this way averages its
    keys. It does the same here, with queries of 0; a NaN in them stays NaN.
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
    size = query.shape[3]
    if _must_pad(query):
        scale = scale or size**-0.5
        output, lse = attention_with_lse(_padded(query), _padded(key), _padded(value), mask, scale)
        return output[..., :size], lse
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
    """Attention over two sets of keys from attention over each, in fp32. `one` is used up: its output is written over.

    A row that sees no key of one set takes the other's output unchanged; a row that sees none of either is 0.
    """
    one_lse, other_lse, base = _on_one_base(one, other)
    least = torch.finfo(one_lse.dtype).min  # where neither sees a key, -inf + inf would be NaN
    share = torch.sigmoid(other_lse - one_lse.clamp(min=least)).unsqueeze(-1)  # exp(other) / (exp(one) + exp(other))
    output = one.output.float().lerp_(other.output.float(), share)  # one pass over the outputs
    return Partial(output, torch.logaddexp(one_lse, other_lse), base)


def _on_one_base(one: Partial, other: Partial) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Both logs relative to the higher base, and that base."""
    if one.base is None or other.base is None:
        return one.lse, other.lse, None
    base = torch.maximum(one.base, other.base)
    floor = base.masked_fill(torch.isneginf(base), 0)
    return one.lse + (one.base - floor), other.lse + (other.base - floor), base


def _must_pad(query: torch.Tensor) -> bool:
    """Whether heads must be padded: CUDA's kernels read rows of whole vectors."""
    return query.device.type == "cuda" and query.shape[3] % HEAD_SIZES != 0


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """`(B, S, H, D)` with zeros at the end of each head, which change no score."""
    return pad(tensor, (0, -tensor.shape[3] % HEAD_SIZES))


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
