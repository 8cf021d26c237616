"""Qwen-Image: guided only if a negative prompt is given, like its classic pipeline."""

from deploy.families.family import DecodeBytes, ForwardBytes, PipelineFamily
from deploy.families.schedulers import FLOW_MATCH

FAMILY = PipelineFamily(
    pipeline="QwenImagePipeline",
    makes="image",
    with_pictures={"image-to-image": "QwenImageImg2ImgPipeline", "inpaint": "QwenImageInpaintPipeline"},
    guided_by_negative_prompt=True,
    forward_bytes={
        "QwenImageTransformer2DModel": ForwardBytes(
            3072, alone=93_184, ulysses=100_352, ring=137_792, shared=49_152, text=512
        ),
    },
    decode_bytes={"AutoencoderKLQwenImage": DecodeBytes(96, picture=3465, video=3465, frame=0, tiles=10)},
    schedulers={**FLOW_MATCH, "UniPCMultistepScheduler": {"use_flow_sigmas": True}},
)
