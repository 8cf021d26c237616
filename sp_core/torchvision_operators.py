"""Makes torchvision importable beside a build of torch for which its operators were not compiled.

transformers prepares pictures with torchvision's Python code. At import, torchvision describes two of its compiled
operators to torch, and fails if torch does not know them. PyPI's torchvision is compiled for CUDA, so beside a CPU
build of torch its operators do not load. They are then declared here, without an implementation, because nobody calls
them.

Nothing comes in or goes out. Every process of spray calls it before it imports diffusers or transformers.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType

PACKAGE = "torchvision"

OPERATORS = dict.fromkeys(("nms", "qnms"), "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""The operators that torchvision describes at import, with their signatures."""


def declare_missing_operators() -> None:
    """Arrange that importing torchvision declares the operators, if they cannot be loaded. Imports nothing itself."""
    if PACKAGE not in sys.modules and not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds torchvision where Python does."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, path) if name == PACKAGE else None
        if found is None or found.origin is None:
            return None
        places = found.submodule_search_locations
        loader = _Loader(name, found.origin)
        return spec_from_file_location(name, found.origin, loader=loader, submodule_search_locations=places)


class _Loader(SourceFileLoader):
    """Loads torchvision as Python does, once its operators are known."""

    def exec_module(self, module: ModuleType) -> None:
        compiled = PathFinder.find_spec("_C", module.__path__)
        _load_or_declare(compiled.origin if compiled else None)
        super().exec_module(module)


def _load_or_declare(library: str | None) -> None:
    import torch  # here: a process that never imports torchvision may never need torch

    if library:
        with suppress(OSError):  # it was linked with another torch
            torch.ops.load_library(library)
            return
    for name, signature in OPERATORS.items():
        if hasattr(getattr(torch.ops, PACKAGE), name):  # from an earlier import, which failed
            continue
        torch.library.define(f"{PACKAGE}::{name}", signature)
