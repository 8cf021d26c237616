"""ConsisID: like CogVideoX. Both streams are gathered after the last block, because the forward joins them again.

Faces, which are attended to between the blocks, have no example.
"""

from sp_core.models.family import Example, ModelFamily
from sp_core.models.planned import cog_video_x
from sp_core.sp_plan import SequenceParallelOutput

CONSIS_ID = ModelFamily(
    transformer_classes=("ConsisIDTransformer3DModel",),
    refused_pipelines={"ConsisIDPipeline": "it finds faces with OpenCV and insightface, which spray does not install"},
    sp_plan={name: entry for name, entry in cog_video_x.SP_PLAN.items() if name != "proj_out"}
    | {
        "transformer_blocks.-1": [
            SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
            SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="encoder_hidden_states"),
        ],
    },
    captured_processors=("CogVideoXAttnProcessor2_0",),
    examples={"consis-id": Example("ConsisIDTransformer3DModel", cog_video_x.TINY, cog_video_x.inputs)},
)
