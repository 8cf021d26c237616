"""SkyReels V2: built as Wan is. Diffusion forcing, with a timestep for each frame, has no proof and so no plan."""

from sp_core.models.family import Example, ModelFamily
from sp_core.models.planned import as_wan

SKYREELS_V2 = ModelFamily(
    transformer_classes=("SkyReelsV2Transformer3DModel",),
    sp_plan=as_wan.SP_PLAN,
    pipelines=("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline"),
    refused_pipelines=dict.fromkeys(
        (
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        ),
        "it has a loop within its loop, with a timestep for each frame",
    ),
    local_attention=("*.attn2",),
    examples={"skyreels-v2": Example("SkyReelsV2Transformer3DModel", as_wan.TINY, as_wan.inputs, as_wan.GAINS)},
)
