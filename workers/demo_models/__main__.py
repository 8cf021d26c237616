"""Writes a demo model: a tiny pipeline in diffusers' folder format, offline, from a seed.

    python -m workers.demo_models.__main__ OUT [--family qwen-image|z-image|wan|flux]

It has every part of the real one (tokenizers, text encoders, transformers, VAE, scheduler) with random weights: it
draws patterns, not things. Used by `make demo` and by the tests; what it is made of is in `workers.demo_models`.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from workers.demo_models import flux, qwen_image, wan, z_image

FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen-image": qwen_image.pipeline,
    "z-image": z_image.pipeline,
    "wan": wan.pipeline,
    "flux": flux.pipeline,
}
"""What makes the pipeline, by the name of its family."""


def write_demo_model(out: Path, family: str = "qwen-image") -> None:
    """Write the model folder `out`, whole or not at all. The same call always writes the same weights.

    Args:
        out: the folder; one that is there already is replaced.
        family: one of `FAMILIES`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=out.parent))
    try:
        FAMILIES[family]().save_pretrained(unfinished)
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main() -> None:
    """Command line: `python -m workers.demo_models.__main__ OUT [--family NAME]`."""
    parser = argparse.ArgumentParser(description="Write a tiny demo model in diffusers' folder format.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--family", choices=FAMILIES, default="qwen-image", help="which kind (default: qwen-image)")
    arguments = parser.parse_args()
    write_demo_model(arguments.out, arguments.family)
    sys.stdout.write(f"{arguments.out}\n")


if __name__ == "__main__":
    main()
