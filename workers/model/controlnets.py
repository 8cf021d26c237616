"""A ControlNet beside the transformer: every rank runs it whole, and its residuals are split where they enter.

The transformer's plan names the parameters that take them. Called by `workers.model.loader` and the adapter of classic
pipelines.
"""

from typing import Any

import torch
from torch import nn

from sp_core.torch_private import without_hooks
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest


def run_whole(pipeline: Any) -> None:
    """Make the parts that a ControlNet borrows from the parallelized transformer see all tokens while it runs.

    Z-Image's borrows embeddings and refiners. It gets the refiners' layers without the hooks that split, and rotations
    in diffusers' form. Other ControlNets have all parts of their own, and nothing is done.

    Args:
        pipeline: the complete pipeline, with or without a ControlNet.
    """
    controlnet: Any = getattr(pipeline, "controlnet", None)  # a modular pipeline may have a place for one
    if controlnet is None:
        return
    for name, stack in list(controlnet.named_children()):
        lent: Any = getattr(pipeline.transformer, name, None)
        if isinstance(lent, nn.ModuleList) and lent is stack:
            setattr(controlnet, name, nn.ModuleList([without_hooks(layer) for layer in lent]))
    if hasattr(controlnet, "rope_embedder"):
        controlnet.rope_embedder = _ComplexRotations(controlnet.rope_embedder)


class _ComplexRotations:
    """Rotations as complex numbers; the transformer's may be pairs of real ones.

    Args:
        embedder: makes rotations of positions.
    """

    def __init__(self, embedder: Any) -> None:
        self._embedder = embedder

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        rotations: torch.Tensor = self._embedder(positions)
        return rotations if rotations.is_complex() else torch.view_as_complex(rotations)


def control_modes(pipeline: Any) -> int:
    """The number of kinds of control from which a request must choose; 0: one kind, or no ControlNet."""
    controlnet: nn.Module | None = getattr(pipeline, "controlnet", None)
    return int(getattr(getattr(controlnet, "config", None), "num_mode", None) or 0)


def check_control_mode(pipeline: Any, request: GenerationRequest) -> None:
    """Reject a kind of control that the ControlNet does not have: it would read a missing embedding.

    Raises:
        InvalidParameter: names `extra_params.control_mode`.
    """
    mode, kinds = request.extra_params.get("control_mode"), control_modes(pipeline)
    if mode is None or (isinstance(mode, int) and 0 <= mode < kinds):
        return
    allowed = f"must be from 0 to {kinds - 1}" if kinds else "is not for this ControlNet, which has one kind of control"
    raise InvalidParameter("extra_params.control_mode", f"control_mode {allowed}, got {mode!r}; leave it out")
