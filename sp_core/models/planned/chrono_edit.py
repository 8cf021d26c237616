"""ChronoEdit: like Wan; its rotations skip frames."""

from sp_core.models.family import Example, ModelFamily
from sp_core.models.planned import as_wan

CHRONO_EDIT = ModelFamily(
    transformer_classes=("ChronoEditTransformer3DModel",),
    pipelines=("ChronoEditPipeline",),
    sp_plan=as_wan.SP_PLAN,
    local_attention=("*.attn2",),
    examples={
        "chrono-edit": Example(
            "ChronoEditTransformer3DModel",
            as_wan.TINY | {"rope_temporal_skip_len": 8},
            as_wan.inputs,
            as_wan.GAINS,
        ),
    },
)
