"""Writes a demo model: a tiny pipeline in diffusers' folder format, with every part of the real one.

Used by `python -m workers.demo_models` and by the tests.
"""

import importlib
import pkgutil
import shutil
import tempfile
from pathlib import Path
from types import ModuleType

from deploy.families.lookup import families
from workers.demo_models import classic

CLASSIC = tuple(found.name for found in pkgutil.iter_modules(classic.__path__))

FAMILIES = tuple(name.replace("_", "-") for name in (*families(), *CLASSIC))


def write_demo_model(out: Path, family: str, pipeline: str | None = None) -> None:
    """Write the model folder `out`, whole or not at all. The same call always writes the same weights.

    Args:
        out: the folder; one that is there already is replaced.
        family: one of `FAMILIES`.
        pipeline: the class of the pipeline, if the family has several; None: the one that begins with text alone.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    demo_pipeline = _module(family.replace("-", "_")).demo_pipeline
    unfinished = Path(tempfile.mkdtemp(dir=out.parent))
    try:
        demo_pipeline(*([pipeline] if pipeline else [])).save_pretrained(unfinished)
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _module(family: str) -> ModuleType:
    """Only the asked family's file is loaded: each imports its own text encoders and VAE."""
    room = classic.__name__ if family in CLASSIC else "workers.model.adapters"
    return importlib.import_module(f"{room}.{family}")
