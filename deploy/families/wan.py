"""Wan 2.1 and 2.2, text to video. Its text is only attended to, so it adds no tokens to the sequence."""

from deploy.families.family import DecodeBytes, ForwardBytes, PipelineFamily
from deploy.families.schedulers import FLOW_MATCH

NOT_SHIFTED = {"use_dynamic_shifting": False}
"""The pipeline does not say how far a size shifts."""

FAMILY = PipelineFamily(
    pipeline="WanPipeline",
    makes="video",
    forward_bytes={
        "WanTransformer3DModel": ForwardBytes(5120, alone=113_668, ulysses=124_932, ring=187_328, shared=0, text=0),
    },
    decode_bytes={"AutoencoderKLWan": DecodeBytes(96, picture=3465, video=9744, frame=108, tiles=10)},
    kept_in_fp32={
        "WanTransformer3DModel": frozenset({"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}),
    },
    vae_in_fp32=True,
    needed_with={"boundary_ratio": "transformer_2"},
    schedulers={
        **{name: {**needs, **NOT_SHIFTED} for name, needs in FLOW_MATCH.items()},
        "FlowMatchHeunDiscreteScheduler": {},
        "FlowMapEulerDiscreteScheduler": {},
        "UniPCMultistepScheduler": NOT_SHIFTED,
        "DPMSolverMultistepScheduler": {},
        "DPMSolverSinglestepScheduler": {},
        "DEISMultistepScheduler": {},
        "EulerDiscreteScheduler": {},
        "HeunDiscreteScheduler": {},
        "KDPM2DiscreteScheduler": {},
        "EDMEulerScheduler": {},
        "EDMDPMSolverMultistepScheduler": {},
    },
    # diffusers' modular Wan has no blocks for it, and would silently make another size
    refused={"expand_timesteps": "is a Wan TI2V model (expand_timesteps), which spray cannot run step by step yet"},
)
