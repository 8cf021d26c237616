"""Chroma: Flux whose modulation is approximated by a network of its own, from the timestep alone."""

from sp_core.models.family import Example, ModelFamily
from sp_core.models.planned import as_flux

CHROMA = ModelFamily(
    transformer_classes=("ChromaTransformer2DModel",),
    sp_plan=as_flux.SP_PLAN,
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline"),
    refused_pipelines={
        "ChromaInpaintPipeline": "its call fails: it reads guidance_embeds, which its ChromaTransformer2DModel lacks",
    },
    examples={
        "chroma": Example(
            "ChromaTransformer2DModel",
            as_flux.TINY | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 2},
            as_flux.inputs,
            {"distilled_guidance_layer": 3},
            no_mask="its mask spans text and image, which a plan cannot split; without one all tokens take part",
        ),
    },
)
