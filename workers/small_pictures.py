"""Some pipelines scale every picture to a megapixel. For their proofs it is 1/64 of that: they then take seconds.

A model folder comes in. While a block runs, the functions and lists by which its pipeline chooses sizes choose smaller
ones; nothing else changes. Called by `workers.pipeline_proof` and by the tests.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers

from deploy.model_folder import read_index

FEWER = 64
"""Pixels of which one remains."""

LISTS = {
    "PREFERRED_KONTEXT_RESOLUTIONS": [(96, 80), (80, 96)],
    "BUCKETS": {1024: [(112, 80), (80, 112), (96, 96)]},
}
"""Small sizes instead of those that a pipeline chooses from, by the names of its lists."""


@contextmanager
def small_pictures(folder: Path) -> Iterator[None]:
    """While this lasts, the pipeline of the model scales pictures to fewer pixels."""
    found = sys.modules[getattr(diffusers, read_index(folder)["_class_name"]).__module__]
    beside = sys.modules.get(f"{found.__package__}.image_processor")
    with ExitStack() as changes:
        for module in filter(None, (found, beside)):
            for name in LISTS.keys() & vars(module).keys():
                changes.enter_context(mock.patch.object(module, name, LISTS[name]))
            if calculate := getattr(module, "calculate_dimensions", None):
                changes.enter_context(
                    mock.patch.object(module, "calculate_dimensions", functools.partial(_fewer, calculate))
                )
        yield


def _fewer(calculate: Callable[..., Any], area: int, ratio: float) -> Any:
    return calculate(area // FEWER, ratio)
