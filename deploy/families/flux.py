"""Flux.1: guidance is distilled into the transformer, so a step has one branch."""

from deploy.families.family import AUTOENCODER_KL, ForwardBytes, PipelineFamily
from deploy.families.schedulers import FLOW_MATCH

SHIFTED = {"use_flow_sigmas": True, "use_dynamic_shifting": True}
"""A solver can use the sigmas that the pipeline passes only with both of these."""

FAMILY = PipelineFamily(
    pipeline="FluxPipeline",
    makes="image",
    with_pictures={"image-to-image": "FluxImg2ImgPipeline"},
    guided_above=None,
    forward_bytes={
        "FluxTransformer2DModel": ForwardBytes(
            3072, alone=105_484, ulysses=105_484, ring=136_780, shared=86_016, text=512
        ),
    },
    decode_bytes={"AutoencoderKL": AUTOENCODER_KL},
    components=("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"),
    schedulers={
        **FLOW_MATCH,
        "UniPCMultistepScheduler": {"use_flow_sigmas": True},
        "DPMSolverMultistepScheduler": SHIFTED,
        "DPMSolverSinglestepScheduler": SHIFTED,
        "DEISMultistepScheduler": SHIFTED,
    },
)
