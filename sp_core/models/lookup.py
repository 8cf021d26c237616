"""Finds the family of a transformer class. A new file in this folder is found without being named anywhere.

Called by `sp_core.parallelize`, `sp_core.verify.examples` and `deploy.memory`; loads no torch.
"""

import functools
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from sp_core import models
from sp_core.models import planned
from sp_core.models.family import ModelFamily


@functools.cache
def families() -> tuple[ModelFamily, ...]:
    """Every `ModelFamily` of this folder, in order of file names, then those of `planned`."""
    return _in(models) + planned_families()


@functools.cache
def planned_families() -> tuple[ModelFamily, ...]:
    """Those whose sequence plan was found by `spray plan`."""
    return _in(planned)


def _in(package: ModuleType) -> tuple[ModelFamily, ...]:
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, ModelFamily))


def find_family(class_names: Iterable[str]) -> ModelFamily | None:
    """The family of the first of these transformer classes that has one.

    Args:
        class_names: of a class and its bases, the most derived first: a subclass belongs to its base's family.
    """
    return next((family for name in class_names for family in families() if name in family.transformer_classes), None)
