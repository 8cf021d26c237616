"""Exchanges parts of a model for something faster that gives the same answer, as its family's file declares.

A replacement changes instances, never a class, and is undone by the handle of `sp_core.parallelize`, which calls this.
Each has a file of its own; `ModelFamily.replacements` says which apply to a family.

A family's file knows diffusers' own class. So a subclass, a model with a plan of its own, and one whose processors were
exchanged keep all their parts.
"""

import logging
from collections.abc import Callable

from torch import nn

from sp_core import fused_gelu, real_rotation, shared_modulation
from sp_core.mesh import ParallelMesh
from sp_core.models.family import Config, FusedGelu, ModelFamily, RealRotation

_logger = logging.getLogger(__name__)


def apply_replacements(
    model: nn.Module, family: ModelFamily | None, config: Config, mesh: ParallelMesh
) -> list[Callable[[], None]]:
    """Make the replacements of the family that fit this model.

    Args:
        model: the hooks of its plan are installed already; its attention is not bound yet.
        family: its family, if it has one.
        config: the model's.
        mesh: the ranks.

    Returns:
        Functions that undo them, to be called in reverse order.
    """
    kind = type(model)
    if (
        family is None
        or kind.__name__ not in family.transformer_classes
        or not kind.__module__.startswith("diffusers.")
    ):
        return []
    undo = []
    for replacement in family.replacements:
        if isinstance(replacement, RealRotation):
            done = real_rotation.replace(model, replacement)
        elif isinstance(replacement, FusedGelu):
            done = fused_gelu.replace(model, replacement)
        else:
            done = shared_modulation.replace(model, config, replacement, mesh)
        if done is None:
            _logger.info("%s keeps this part of its own: it is not as %s expects", kind.__name__, replacement)
        else:
            undo.append(done)
    return undo
