"""Exchanges parts of a model for faster ones with the same answer, as its family's file declares.

A replacement changes instances, never a class. `sp_core.parallelize` calls this, and its handle undoes it. Each kind of
replacement has a module of its own; `ModelFamily.replacements` says which apply to a family.

A family's file describes diffusers' own class. Subclasses, models with a plan of their own, and models with exchanged
processors therefore keep all their parts.
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
        config: the config of the model.
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
