"""Lets torch's build for CPU handle tensors that say they are on CUDA.

Indexing such a tensor asks for CUDA's device guard, the C++ object that switches the current device. A build for CPU
has none, and the indexing fails. torch ships a guard that does nothing, for whoever registers it in C++.
"""

import ctypes
import functools
import os
import subprocess
from pathlib import Path

import torch

from tests.support.programs import needs

needs_guard = needs("g++", "CUDA tensors without a GPU need a device guard, which is compiled once")

_SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
}
"""


@functools.cache
def register_guard() -> None:
    """Register a guard that does nothing, in this process. A build for CUDA has its own."""
    if torch.version.cuda:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spray"
    library = cache / f"cuda-guard-{torch.__version__}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _compile(library)
    ctypes.CDLL(str(library))


def _compile(library: Path) -> None:
    """Into a file of its own first: several ranks may compile at once."""
    torch_folder, own = Path(torch.__file__).parent, library.with_suffix(f".{os.getpid()}")
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    subprocess.run(["g++", *flags, "-x", "c++", "-", "-lc10", "-o", str(own)], input=_SOURCE.encode(), check=True)
    own.replace(library)
