"""SkyReels V2: like Wan. Diffusion forcing has a timestep for each frame, so each token has its own modulation.

The forward modulates the tokens once more after the last block, by a tensor that every rank has whole, so they are
gathered there and not at the last projection.
"""

from typing import Any

from sp_core.models.family import Config, Example, ModelFamily, Tokens
from sp_core.models.planned import as_wan
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelModelPlan, SequenceParallelOutput

_PLAN: SequenceParallelModelPlan = {
    "rope": as_wan.SP_PLAN["rope"],
    "blocks.0": as_wan.SP_PLAN["blocks.0"],
    "blocks.*": {"temb": SequenceParallelCompanion(split_dim=2, expected_dims=4, optional=True)},
    "blocks.-1": SequenceParallelOutput(gather_dim=1, expected_dims=3),
}


def _forcing_inputs(tokens: Tokens) -> dict[str, Any]:
    """Three frames, of which the first is done already."""
    return as_wan.inputs(tokens) | {
        "hidden_states": tokens.normal(tokens.batch, 4, 3, 2 * tokens.height, 2 * tokens.width),
        "timestep": tokens.tensor([[0.0, 500.0, 900.0]] * tokens.batch),
        "enable_diffusion_forcing": True,
    }


def _refuses(config: Config) -> str:
    if config.get("num_frame_per_block", 1) > 1:
        return "its attention is causal by blocks of frames (num_frame_per_block), of the whole sequence"
    return ""


SKYREELS_V2 = ModelFamily(
    transformer_classes=("SkyReelsV2Transformer3DModel",),
    sp_plan=_PLAN,
    pipelines=(
        "SkyReelsV2Pipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    refuses=_refuses,
    local_attention=("*.attn2",),
    examples={
        "skyreels-v2": Example("SkyReelsV2Transformer3DModel", as_wan.TINY, as_wan.inputs, as_wan.GAINS),
        "skyreels-v2 forcing": Example(
            "SkyReelsV2Transformer3DModel",
            as_wan.TINY,
            _forcing_inputs,
            as_wan.GAINS,
        ),
    },
)
