"""Seconds, FLOP, launches and memory of a call on one device."""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch._C._autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

Call = Callable[[], object]


def finish(device: torch.device) -> None:
    """Wait for all that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Call, device: torch.device) -> float:
    """Seconds of one call."""
    finish(device)
    began = time.perf_counter()
    call()
    finish(device)
    return time.perf_counter() - began


def seconds(call: Call, device: torch.device, enough_s: float) -> float:
    """Seconds of a short call: the median of five rounds of as many calls as take `enough_s` together."""
    call()
    calls = max(1, min(1000, int(enough_s / 5 / once(call, device))))

    def several() -> None:
        for _ in range(calls):
            call()

    return statistics.median(once(several, device) / calls for _ in range(5))


def in_turn(calls: Mapping[str, Call], device: torch.device, enough_s: float, least: int) -> dict[str, list[float]]:
    """Seconds of long calls that take turns, until all have taken `enough_s` together, at most ten times."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(10):
        if turn >= least and time.perf_counter() - began > enough_s:
            break
        for name, call in calls.items():
            found[name].append(once(call, device))
    return found


def flops(call: Call, device: torch.device) -> int:
    """What a call multiplies and adds, in matrix products, convolutions and attention."""
    # torch does not count its attention for CPU, but does count the products that it consists of
    plainly = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    products = {torch.ops.aten._addmm_activation: addmm_flop}  # a product that applies GELU is one, too
    with FlopCounterMode(display=False, custom_mapping=products) as counter, plainly:
        call()
    return int(counter.get_total_flops())


def launches(call: Call, device: torch.device) -> int:
    """Kernels and copies that a call puts into the queue of a GPU; on a CPU, operators."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        call()
        finish(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    # torch.compile names regions, which show up among the kernels
    return sum(event.device_type == kind and not event.is_user_annotation for event in seen.events())


def longest_kernels(call: Call, device: torch.device, number: int) -> list[tuple[str, float, int, str]]:
    """Name, milliseconds, calls and share of the kernels that take longest in a call on a GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        finish(device)
    spent: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spent.setdefault(event.name, []).append(event.self_device_time_total / 1e3)
    total = sum(map(sum, spent.values()))
    found = sorted(spent.items(), key=lambda each: -sum(each[1]))[:number]
    return [(name[:90], sum(ms), len(ms), f"{sum(ms) / total:.1%}") for name, ms in found]


def launches_and_peak(call: Call, device: torch.device) -> tuple[int, int | None]:
    """As `launches`, and the bytes that torch has handed out at most meanwhile, weights included; None on a CPU."""
    if device.type != "cuda":
        return launches(call, device), None
    finish(device)
    torch.cuda.reset_peak_memory_stats(device)
    return launches(call, device), torch.cuda.max_memory_allocated(device)


def best_gemm(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a square matrix product of random numbers."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device, 0.2)
