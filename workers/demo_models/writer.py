"""Writes a demo model: a tiny pipeline in diffusers' folder format, with every part of the real one.

Used by `python -m workers.demo_models` and by the tests.
"""

import shutil
import tempfile
from pathlib import Path

from deploy.families.lookup import families
from workers.demo_models.pipelines import CLASSIC, demo_of

FAMILIES = tuple(name.replace("_", "-") for name in (*families(), *CLASSIC))


def write_demo_model(out: Path, family: str, pipeline: str | None = None) -> None:
    """Write the model folder `out`, whole or not at all. The same call always writes the same weights.

    Args:
        out: the folder; one that is there already is replaced.
        family: one of `FAMILIES`.
        pipeline: the class of the pipeline, if the family has several; None: the one that begins with text alone.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=out.parent))
    try:
        demo_of(family.replace("-", "_"), pipeline).save_pretrained(unfinished)
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
