"""Ovis-Image: like Flux, without a pooled prompt."""

from sp_core.models.family import Example, ModelFamily
from sp_core.models.planned import as_flux

OVIS_IMAGE = ModelFamily(
    transformer_classes=("OvisImageTransformer2DModel",),
    sp_plan=as_flux.SP_PLAN,
    pipelines=("OvisImagePipeline",),
    examples={
        "ovis-image": Example(
            "OvisImageTransformer2DModel", as_flux.TINY | {"out_channels": 8}, as_flux.inputs, as_flux.GAINS
        ),
    },
)
