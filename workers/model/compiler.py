"""Compiles a rank's blocks into a folder that the next process finds, and logs what was found there.

A `ModelSpec` and `storage.compiled` come in. Called by `workers.gang.rank` around whatever warms up.
"""

import contextlib
import hashlib
import logging
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from deploy.model_spec import ModelSpec
from workers.model.compile_cache import CompileCache, Warmed, cache_folder, what_decides
from workers.model.torch_internals import compile_into, graphs, recordings_refused

logger = logging.getLogger(__name__)


class Compiler:
    """The folder for the compiled blocks of one rank. Nothing happens before `warming`.

    Args:
        model: the model; its `source` is a folder of this node.
        root: `storage.compiled` of the deployment; None: among temporary files.
        device: of the rank.

    Attributes:
        has_compiled: whether a warm-up had to compile some block, because no earlier process had.
    """

    def __init__(self, model: ModelSpec, root: str | None, device: torch.device) -> None:
        self._model, self._root, self._device = model, root, device
        self._cache: CompileCache | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._opened = False
        self.has_compiled = False

    @contextlib.contextmanager
    def warming(self, what: str) -> Iterator[None]:
        """Inside, blocks are compiled unless an earlier process has done so; the next process finds them.

        Args:
            what: what is warmed up, in a word; its time is compared with earlier ones of the same.
        """
        if self._model.compile and not self._opened:
            self._opened = True
            self._open()
        cached_before, compiled_before = graphs()
        refused_before = recordings_refused()
        began = time.monotonic()
        yield
        cached, compiled = graphs()
        self.has_compiled = self.has_compiled or compiled > compiled_before
        if self._model.cuda_graphs and (refused := recordings_refused() - refused_before):
            logger.warning("%d graphs run without being recorded as CUDA graphs; torch's log says why", refused)
        if self._cache is not None:
            seconds = time.monotonic() - began
            self._cache.keep(Warmed(what, cached - cached_before, compiled - compiled_before, seconds))

    def _open(self) -> None:
        """A folder that cannot be used costs what it would have saved: this process then has one of its own."""
        try:
            cache = CompileCache(cache_folder(self._root), what_decides(self._model, code_target(self._device)))
        except OSError as error:
            logger.warning("compiled blocks are not kept: %s", error)
            self._temporary = tempfile.TemporaryDirectory(prefix="spray-compiled-")  # private, unlike torch's own
            compile_into(Path(self._temporary.name))
            return
        self._cache = cache if compile_into(cache.folder) else None


def code_target(device: torch.device) -> str:
    """The target of a device's code: the GPU's model and CUDA's version, or the CPU with its instructions."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.major}.{properties.minor}, {torch.version.cuda or torch.version.hip}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    described = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return f"{platform.machine()}, {hashlib.sha256(chr(10).join(described).encode()).hexdigest()[:12]}"
