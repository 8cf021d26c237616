"""How much memory a rank uses, and how much there is: in bytes, by kind. For `workers.gang.rank_telemetry`."""

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_use(device: torch.device) -> dict[str, int]:
    """`used` and `peak` of this rank, and the `limit`.

    On a GPU, they are what torch has reserved, the most that tensors took since the last call, and the most that torch
    can reserve: CUDA, NCCL and others have the rest. On a CPU, they are what the process has resident, the most since
    it began, and what the container or the machine has for all processes.
    """
    if device.type == "cuda":
        # Not the most that was reserved: torch keeps that for later requests, so it would not tell how near they come.
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        reserved, (free, _) = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)
        return {"used": reserved, "peak": peak, "limit": reserved + free}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else 1024 * peak  # macOS reports bytes, Linux KiB
    return {"used": min(peak, _resident() or peak), "peak": peak, "limit": _host_limit()}


def _resident() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _host_limit() -> int:
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such control group, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)
