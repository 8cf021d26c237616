"""What a model family's file declares. Read by `sp_core.parallelize` and the diffusers seam; no torch, no diffusers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sp_core.sp_plan import SequenceParallelModelPlan
from sp_core.tp_plan import TensorParallelPlan


@dataclass(frozen=True)
class ModelFamily:
    """How one family of transformers is parallelised.

    Module names are patterns, in which `*` stands for anything (`"*.attn2"`).

    Attributes:
        transformer_classes: names of the diffusers classes that it covers.
        sp_plan: their sequence plan, or what makes it from the model's config.
        tp_plan: their tensor plan, or what makes it from the model's config; empty: diffusers' `_tp_plan` is right.
        local_attention: modules that attend to tokens which are whole on every rank, although their processor would
            join in, or could not (cross-attention, refiners in front of the region).
        own_stream: modules whose attention sees one of the streams only, and the parameter name of that stream.
        captured_processors: class names of processors that call torch's attention themselves instead of going through
            diffusers' dispatch; all of that attention is over the region's own tokens.
        refused_processors: class names of processors that would be silently wrong, and why.
    """

    transformer_classes: tuple[str, ...]
    sp_plan: SequenceParallelModelPlan | Callable[[Mapping[str, Any]], SequenceParallelModelPlan]
    tp_plan: TensorParallelPlan | Callable[[Mapping[str, Any]], TensorParallelPlan] = field(default_factory=dict)
    local_attention: tuple[str, ...] = ()
    own_stream: Mapping[str, str] = field(default_factory=dict)
    captured_processors: tuple[str, ...] = ()
    refused_processors: Mapping[str, str] = field(default_factory=dict)
