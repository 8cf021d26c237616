"""What a rank says of its memory."""

import pytest
import torch

from workers.gang.memory_use import memory_use


def test_on_a_gpu_the_peak_is_that_of_the_latest_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a GPU that keeps the most for later requests."""
    peaks = [70]
    for name, value in {
        "memory_reserved": lambda _: 90,
        "max_memory_allocated": lambda _: peaks[-1],
        "reset_peak_memory_stats": lambda _: peaks.append(20),
        "mem_get_info": lambda _: (10, 128),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    gpu = torch.device("cuda", 1)
    assert memory_use(gpu) == {"used": 90, "peak": 70, "limit": 100}
    assert memory_use(gpu) == {"used": 90, "peak": 20, "limit": 100}


def test_on_a_cpu_it_is_that_of_the_process() -> None:
    use = memory_use(torch.device("cpu"))
    assert 1e7 < use["used"] <= use["peak"] < use["limit"]
