"""Which attention kernel torch takes on CUDA, and plain arithmetic that answers as each of them does, and as CUDA's
product with GELU does.

Shapes, as these kernels have them: B batch, H heads, S query and K key tokens, D head size; q `(B, H, S, D)`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import gelu, pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten

EMPTY = torch.Size([0])


class AttendsAsOnCuda(TorchFunctionMode):
    """Inside, torch's own attention takes the kernel that it takes on a GPU of the Hopper generation: cuDNN's in half
    precision without a mask, else the memory-efficient one. A build for CPU would take arithmetic of many steps."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention and (args[0] if args else kwargs["query"]).is_cuda:
            return _attend(*args, **kwargs)
        return function(*args, **kwargs)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is not None and attn_mask.stride(-1) != 1:
        raise AssertionError(f"a GPU has no fused kernel for a mask with strides of {attn_mask.stride()}")
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    if attn_mask is None and query.dtype != torch.float32:
        taken = _aten._scaled_dot_product_cudnn_attention
        return taken(query, key, value, None, False, 0.0, is_causal, False, scale=scale)[0]
    bias = None if attn_mask is None else _additive(attn_mask, query).expand(*query.shape[:3], key.shape[2])
    taken = _aten._scaled_dot_product_efficient_attention
    return taken(query, key, value, bias, False, 0.0, is_causal, scale=scale)[0]


def _additive(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))


def _softmax(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, which lies in memory as `(B, S, H, D)`, and its log-sum-exp `(B, H, S)`."""
    scores = query.float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.float()
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    lse = scores.logsumexp(-1)
    output = ((scores - lse.unsqueeze(-1)).exp() @ value.float()).to(query.dtype)
    return output.transpose(1, 2).contiguous().transpose(1, 2), lse


def _cudnn(
    query: Any, key: Any, value: Any, bias: Any, lse_wanted: bool, dropout: float = 0.0, is_causal: bool = False,
    debug: bool = False, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    output, lse = _softmax(query, key, value, bias, is_causal, scale)
    return output, lse.unsqueeze(-1), None, None, query.shape[2], key.shape[2], _seed(), _seed(), torch.empty(EMPTY)


def _flash(
    query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, debug: bool = False,
    scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    output, lse = _softmax(query, key, value, None, is_causal, scale)
    return output, lse, None, None, query.shape[2], key.shape[2], _seed(), _seed(), torch.empty(EMPTY)


def _efficient(
    query: Any, key: Any, value: Any, bias: Any, lse_wanted: bool, dropout: float = 0.0, is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Its log-sum-exp is padded to tiles of 32 queries, and left out if nobody wants it."""
    output, lse = _softmax(query, key, value, bias, is_causal, scale)
    padded = pad(lse, (0, -lse.shape[-1] % 32), value=float("inf")) if lse_wanted else lse[..., :0]
    return output, padded, _seed(), _seed()


def _gelu(bias: Any, rows: Any, columns: Any, *, use_gelu: bool = False) -> torch.Tensor:
    """On CUDA GELU's tanh approximation, of the sum in fp32; torch's operator on the CPU computes the exact one."""
    assert use_gelu
    return gelu(bias.float() + rows.float() @ columns.float(), approximate="tanh").to(rows.dtype)


def _seed() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64)


STAND_INS: Mapping[Any, Callable[..., Any]] = {
    _aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    _aten._scaled_dot_product_flash_attention.default: _flash,
    _aten._scaled_dot_product_efficient_attention.default: _efficient,
    _aten._addmm_activation.default: _gelu,
}
"""For each kernel that has none on the CPU a function with its arguments and results."""
