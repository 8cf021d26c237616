"""The private names of torch's compiler that workers uses, here and nowhere else.

`tests/workers/test_torch_internals.py` pins them. Called by `workers.model.compiler`.
"""

import os
from pathlib import Path

from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compile_into(folder: Path) -> bool:
    """Let the compiler of this process use this folder, unless the operator has named another one.

    Returns:
        Whether it uses this folder.
    """
    if os.environ.get(VARIABLE, default_cache_dir()) != default_cache_dir():  # torch names its own at import
        return False
    os.environ[VARIABLE] = str(folder)
    return True


def recordings_refused() -> int:
    """How many graphs of this process were compiled to be recorded as CUDA graphs, and run without. torch logs why."""
    return int(counters["inductor"]["cudagraph_skips"])


def graphs() -> tuple[int, int]:
    """Graphs of this process whose code was in the folder, and graphs that were compiled."""
    seen = counters["inductor"]
    return seen["fxgraph_cache_hit"], seen["fxgraph_cache_miss"] + seen["fxgraph_cache_bypass"]
