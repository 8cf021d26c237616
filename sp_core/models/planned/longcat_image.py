"""LongCat-Image: like Flux."""

from sp_core.models.family import Example, ModelFamily
from sp_core.models.planned import as_flux

LONGCAT_IMAGE = ModelFamily(
    transformer_classes=("LongCatImageTransformer2DModel",),
    sp_plan=as_flux.SP_PLAN,
    pipelines=("LongCatImagePipeline", "LongCatImageEditPipeline"),
    examples={
        "longcat-image": Example(
            "LongCatImageTransformer2DModel",
            as_flux.TINY | {"pooled_projection_dim": 8},
            as_flux.inputs,
            as_flux.GAINS,
        ),
    },
)
