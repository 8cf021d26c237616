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
def files() -> dict[str, tuple[ModelFamily, ...]]:
    """The families of each file, by its name."""
    return _in(models) | _in(planned)


@functools.cache
def families() -> tuple[ModelFamily, ...]:
    """Every `ModelFamily` of this folder, in order of file names, then those of `planned`."""
    return tuple(family for found in files().values() for family in found)


@functools.cache
def planned_families() -> tuple[ModelFamily, ...]:
    """The families of `planned`."""
    return tuple(family for found in _in(planned).values() for family in found)


def _in(package: ModuleType) -> dict[str, tuple[ModelFamily, ...]]:
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    modules = {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
    found = {name: [v for v in vars(module).values() if isinstance(v, ModelFamily)] for name, module in modules.items()}
    return {name: tuple(declared) for name, declared in found.items() if declared}


def find_family(class_names: Iterable[str]) -> ModelFamily | None:
    """The family of the first of these transformer classes that has one.

    Args:
        class_names: of a class and its bases, the most derived first: a subclass belongs to its base's family.
    """
    return next((family for name in class_names for family in families() if name in family.transformer_classes), None)
