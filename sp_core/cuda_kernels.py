"""The attention kernels for CUDA, without a mask and in half precision, and the choice among them.

Shapes: B batch, S query and K key tokens, H heads, D head size; q `(B, S, H, D)`, k and v `(B, K, H, D)`. Called by
`sp_core.kernels`; `sp_core.kernel_choice` makes all ranks take rank 0's choice.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sp_core import torch_private

_logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)

HEAD_SIZES = 8
"""Head sizes are multiples of this, or padded to one."""

LSE_ERROR = 0.02
"""Of a log-sum-exp, which every kernel computes in fp32: ranks are weighed by its exponential when rings are merged."""

WithLse = tuple[torch.Tensor, torch.Tensor]
"""An output `(B, S, H, D)` and its log-sum-exp `(B, S, H)`."""

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], WithLse]
"""q, k, v and the scale."""


def _torch_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> WithLse:
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output, lse, *_ = torch_private.flash_cuda(*heads_first, 0.0, False, False, scale=scale)
    return output.transpose(1, 2), lse.transpose(1, 2)


def _torch_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> WithLse:
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output, lse, *_ = torch_private.cudnn_cuda(*heads_first, None, True, 0.0, False, False, scale=scale)
    return output.transpose(1, 2), lse.reshape(lse.shape[:3]).transpose(1, 2)


def _torch_efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> WithLse:
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output, lse, *_ = torch_private.efficient_cuda(*heads_first, None, True, 0.0, False, scale=scale)
    return output.transpose(1, 2), lse[..., : query.shape[1]].transpose(1, 2)  # padded to whole tiles


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
        "torch-flash": _torch_flash,
        "torch-cudnn": _torch_cudnn,
        "torch-efficient": _torch_efficient,
        "flash-attn-2": _flash_attn_2,
        "flash-attn-3": _flash_attn_3,
    }
)
"""The kernels for CUDA, without a mask, in half precision. GPUs older than Ampere have only torch's memory-efficient
one, in float16."""


TORCHS_OWN: Mapping[str, SDPBackend] = MappingProxyType(
    {
        "torch-flash": SDPBackend.FLASH_ATTENTION,
        "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
        "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
)
"""The kernels among these that torch's own attention can be told to use."""

_in_use: dict[tuple[torch.device, torch.dtype, int], str] = {}


def choose(device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """The kernel in use: the one that `use` has named, else the fastest.

    Raises:
        RuntimeError: no kernel gives the right answer.
    """
    key = (device, dtype, head_size)
    if key not in _in_use:
        _in_use[key] = fastest(device, dtype, head_size)
    return KERNELS[_in_use[key]]


def use(device: torch.device, dtype: torch.dtype, head_size: int, name: str) -> None:
    """Use this kernel from now on.

    Raises:
        RuntimeError: it is not installed, or gives a wrong answer.
    """
    (found,) = try_kernels({name: KERNELS[name]}, device, dtype, head_size).values()
    if isinstance(found, str):
        raise RuntimeError(f"attention_kernel {name} cannot be used on {device} in {dtype}: {found}")
    _in_use[device, dtype, head_size] = name


def preferred(name: str) -> AbstractContextManager[None]:
    """Inside, torch's own attention in this process uses this kernel, one of `TORCHS_OWN`, where it can."""
    others = (*TORCHS_OWN.values(), SDPBackend.MATH)
    return sdpa_kernel([TORCHS_OWN[name], *(each for each in others if each is not TORCHS_OWN[name])], True)


def chosen(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """The name of the kernel in use; None: none has been chosen."""
    return _in_use.get((device, dtype, head_size))


def in_use(device: torch.device) -> str:
    """The kernels of a device, for people: without a mask and in half precision, or with one."""
    if device.type == "cpu":
        return "torch's flash attention for CPU"
    chosen = sorted({name for key, name in _in_use.items() if key[0] == device})
    return "; ".join(filter(None, [", ".join(chosen), "with a mask or in fp32: torch's memory-efficient attention"]))


def fastest(device: torch.device, dtype: torch.dtype, head_size: int, names: Iterable[str] | None = None) -> str:
    """The fastest kernel that is installed and gives the right answer. The result of each is logged.

    Args:
        device: where to try.
        dtype: float16 or bfloat16.
        head_size: D.
        names: the kernels to try; None: all.

    Raises:
        RuntimeError: there is none.
    """
    found = try_kernels({name: KERNELS[name] for name in names or KERNELS}, device, dtype, head_size)
    for name, line in found.items():
        said = f"{line * 1e6:.0f} us" if isinstance(line, float) else line
        _logger.info("attention on %s in %s, head size %d, by %s: %s", device, dtype, head_size, name, said)
    seconds = {name: line for name, line in found.items() if isinstance(line, float)}
    if not seconds:
        raise RuntimeError(f"no attention kernel works on {device} in {dtype} with head size {head_size}: {found}")
    return min(seconds, key=lambda name: seconds[name])


def try_kernels(
    kernels: Mapping[str, Kernel], device: torch.device, dtype: torch.dtype, head_size: int, tokens: int = 4096
) -> dict[str, float | str]:
    """Seconds of each kernel, or why it cannot be used.

    A kernel is right if output and log-sum-exp agree with plain arithmetic in fp32. It is tried with many tokens, and
    as Ulysses calls it: with a scale, for samples whose tokens lie between one another's and fill no whole blocks.
    """
    generator = torch.Generator(device).manual_seed(0)
    drawn = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    many = [drawn(1, tokens, 8, head_size) for _ in range(3)]
    between = [drawn(301, 2, 8, head_size).transpose(0, 1) for _ in range(3)]
    found: dict[str, float | str] = {}
    for name, kernel in kernels.items():
        try:
            wrong = _wrong(kernel, many, None) or _wrong(kernel, between, 0.5 / math.sqrt(head_size))
            found[name] = wrong or _seconds(lambda kernel=kernel: kernel(*many, None), device)  # type: ignore[misc]
        except Exception as error:  # it is not installed, or not for this device
            found[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return found


def _wrong(kernel: Kernel, given: Sequence[torch.Tensor], scale: float | None) -> str:
    """How wrong a kernel is for q, k and v; empty: it is right. The bar is a share of the largest output."""
    (query, key, value), few = given, slice(0, 256)
    output, lse = kernel(query, key, value, scale)
    expected, expected_lse = _plainly(query[:, few], key, value, scale)
    by = float((output[:, few].float() - expected).abs().max() / expected.abs().max())
    lse_by = float((lse[:, few].float() - expected_lse).abs().max())
    if by <= 8 * torch.finfo(query.dtype).eps and lse_by <= LSE_ERROR:
        return ""
    return f"is wrong by {by:.1e} of the largest output, and by {lse_by:.1e} in log-sum-exps"


def _plainly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> WithLse:
    weight = scale or 1 / math.sqrt(query.shape[3])
    scores = torch.einsum("bshd,bkhd->bshk", query.float(), key.float()) * weight
    lse = scores.logsumexp(dim=-1)
    return torch.einsum("bshk,bkhd->bshd", (scores - lse.unsqueeze(-1)).exp(), value.float()), lse


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
