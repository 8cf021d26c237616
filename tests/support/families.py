"""Which demo models and pipelines every run of the tests takes, and which only the soak.

One is in the short run for a mechanism that no other of them has. The proofs of all pipelines are in
`tests/workers/test_support_matrix.py`.
"""

from typing import Any

import pytest

from deploy.families.lookup import families
from workers.demo_models.pipelines import served
from workers.demo_models.writer import FAMILIES

IN_THE_SHORT_RUN = frozenset(families()) | {
    "stable_diffusion_3",  # both branches in one forward; several text encoders
    "ltx",  # a tensor plan; clips
    "hunyuan_video",  # the scale is an input
    "chroma",  # found by the planner; packed latents
    "pixart",  # its call tells no steps; a scheduler of noise; another size than it is asked for
    "hunyuan_image",  # a part of the pipeline guides
    "cog_video_x",  # its scheduler is told of the step before
}

PROVED_IN_THE_SHORT_RUN = (
    "ChromaPipeline",
    "Kandinsky5T2VPipeline",  # its transformer rounds
    "SkyReelsV2DiffusionForcingPipeline",  # a scheduler for each frame; windows that begin with frames before them
)  # fmt: skip
"""Besides those that have tests of their own: `tests/workers/test_adapters.py`, `tests/workers/test_classic.py`."""


def tried() -> list[Any]:
    """All families by the names of `FAMILIES`; those that are not in the short run are marked."""
    return [
        pytest.param(name, marks=() if name.replace("-", "_") in IN_THE_SHORT_RUN else pytest.mark.soak)
        for name in FAMILIES
    ]


def proved() -> list[Any]:
    """All pipelines that are served; those that are not in the short run are marked."""
    return [pytest.param(name, marks=() if name in PROVED_IN_THE_SHORT_RUN else pytest.mark.soak) for name in served()]
