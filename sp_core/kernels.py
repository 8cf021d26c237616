"""Attention on one device. The only place that picks a kernel.

Shapes: B batch, S query and K key tokens, H heads, D head size; q `(B, S, H, D)`, k and v `(B, K, H, D)`.
Masks are additive (-inf hides a key), broadcastable to `(B, H, S, K)`; `local_attention` takes a model's own.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cuda = torch.ops.aten._scaled_dot_product_flash_attention
_efficient_cuda = torch.ops.aten._scaled_dot_product_efficient_attention


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
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # kernels want heads first
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


def local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """As `attention`, with a mask as models have it and with fewer key heads than query heads.

    Args:
        query: `(B, S, H, D)`.
        key: `(B, K, heads, D)`; the heads divide H.
        value: as key.
        mask: boolean (True takes part) or additive, `(B, K)` or broadcastable to `(B, H, S, K)`.
        scale: of the scores; None is 1/sqrt(D).
    """
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None]
    repeats = query.shape[2] // key.shape[2]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    return attention(query, key, value, mask, scale)


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention and what it takes to merge it with attention over other keys.

    Args:
        query: `(B, S, H, D)`.
        key: `(B, K, H, D)`.
        value: `(B, K, H, D)`.
        mask: additive, broadcastable to `(B, H, S, K)`.
        scale: of the scores; None is 1/sqrt(D).

    Returns:
        The output `(B, S, H, D)`, and the log of the softmax's denominator `(B, S, H)` in fp32. Rows without a visible
        key have output 0 and log -inf: the kernels themselves answer NaN or 0 there, which would poison a merge.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if query.device.type == "cpu":
        output, lse = _flash_cpu(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    elif mask is None and query.dtype in (torch.float16, torch.bfloat16):
        output, lse, *_ = _flash_cuda(query, key, value, 0.0, False, False, scale=scale)
    else:
        bias = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
        output, lse, *_ = _efficient_cuda(query, key, value, bias, True, 0.0, False, scale=scale)
        lse = lse[..., : query.shape[2]]  # padded to whole tiles
    output, lse = output.transpose(1, 2), lse.transpose(1, 2)
    if mask is not None:
        blind = torch.isneginf(mask).all(dim=-1).transpose(1, 2)  # (B, S, H) or broadcastable to it
        lse = lse.masked_fill(blind, float("-inf"))
        output = output.masked_fill(blind.unsqueeze(-1), 0)
    return output, lse


def merge(
    output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from attention over each, in fp32.

    Args:
        output: `(B, S, H, D)` over the first set.
        lse: `(B, S, H)` of it.
        other: `(B, S, H, D)` over the second set.
        other_lse: `(B, S, H)` of it.

    Returns:
        Output and log over both; -inf on either side leaves the other as it is, on both sides gives 0 and -inf.
    """
    both = torch.logaddexp(lse, other_lse)
    reference = both.masked_fill(torch.isneginf(both), 0)  # exp(-inf - 0) is 0, where exp(-inf + inf) would be NaN
    weight, other_weight = (torch.exp(part - reference).unsqueeze(-1) for part in (lse, other_lse))
    return output.float() * weight + other.float() * other_weight, both
