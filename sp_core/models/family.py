"""What a model family's file declares. Read by `sp_core.parallelize`; no torch, no diffusers."""

from dataclasses import dataclass

from sp_core.sp_plan import SequenceParallelModelPlan


@dataclass(frozen=True)
class ModelFamily:
    """How one family of transformers is parallelised.

    Attributes:
        transformer_classes: names of the diffusers classes that it covers.
        sp_plan: their sequence plan.
    """

    transformer_classes: tuple[str, ...]
    sp_plan: SequenceParallelModelPlan
