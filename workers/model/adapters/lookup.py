"""Finds the adapter of a model folder by the name of its family. Files in this folder are found without a list.

Called by `workers.model.loader` and `workers.model.denoising`.
"""

import functools
import importlib
from pathlib import Path
from types import ModuleType

from deploy.families.lookup import family_name, find_family
from workers.model.adapters.pipeline_adapter import PipelineAdapter


def find_adapter(folder: Path) -> PipelineAdapter:
    """The adapter of the pipeline that a model folder is for.

    Raises:
        ValueError: the folder is not a model, or one that spray cannot run.
    """
    adapter: type[PipelineAdapter] = _module(family_name(folder)).ADAPTER
    return adapter(find_family(folder))


@functools.cache
def _module(family: str) -> ModuleType:
    """The module of one family. Others are not loaded: each imports its own text encoders and VAE."""
    return importlib.import_module(f"workers.model.adapters.{family}")
