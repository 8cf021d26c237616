"""Finds the adapter of a model folder by the name of its family. A new file in this folder needs no list.

Called by `workers.model.loader` and `workers.model.denoising`; `demo_pipeline` by `workers.demo_models`.
"""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from deploy.families.lookup import families, family_name
from workers.model.adapters.pipeline_adapter import PipelineAdapter


def find_adapter(folder: Path) -> PipelineAdapter:
    """The adapter of the pipeline that a model folder is for.

    Raises:
        ValueError: the folder is not a model, or one that spray cannot run.
    """
    name = family_name(folder)
    adapter: type[PipelineAdapter] = _module(name).ADAPTER
    return adapter(families()[name])


def demo_pipeline(family: str) -> Callable[[], Any]:
    """The function that builds a family's demo model, a classic pipeline of diffusers.

    Args:
        family: one of `deploy.families.lookup.families()`.
    """
    build: Callable[[], Any] = _module(family).demo_pipeline
    return build


@functools.cache
def _module(family: str) -> ModuleType:
    """Only the asked family's file is loaded: each imports its own text encoders and VAE."""
    return importlib.import_module(f"workers.model.adapters.{family}")
