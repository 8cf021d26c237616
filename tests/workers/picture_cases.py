"""What each pipeline that begins with pictures is asked for, as a request and as the arguments of its classic call."""

import io
from dataclasses import replace
from typing import Any

from PIL import Image

from tests.workers.test_adapters import PICTURES, VIDEO
from tests.workers.test_picture_inputs import IMAGE, MASK, PHOTO, WHERE, painted, png
from workers.messages import GenerationRequest, MediaInput


def animated(frames: list[Image.Image]) -> bytes:
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


OTHER = painted(72, 80).rotate(180)
LAST, CONTROL = MediaInput("last_image", png(OTHER)), MediaInput("control_image", png(OTHER))
FRAMES = [PHOTO.rotate(10 * i) for i in range(9)]
CLIP_IN = MediaInput("video", animated(FRAMES))

PICTURE = replace(PICTURES, inputs=(IMAGE,), strength=0.7)
"""Three of four steps; two pictures."""
PAINTED = replace(PICTURE, inputs=(IMAGE, WHERE))
CLIP = replace(VIDEO, n=1, inputs=(IMAGE,))
EDIT = replace(PICTURES, inputs=(IMAGE,))
CONTROLLED = replace(PICTURES, inputs=(CONTROL,))

SIZED = PHOTO.resize((PICTURES.width, PICTURES.height), Image.Resampling.LANCZOS)
"""What a pipeline is given that makes pictures of the size of its own."""

CASES: dict[str, tuple[str, str, GenerationRequest, dict[str, Any]]] = {
    "img2img": (
        "stable-diffusion-3",
        "StableDiffusion3Img2ImgPipeline",
        replace(PICTURE, negative_prompt="blurry"),
        {"image": PHOTO, "strength": 0.7, "guidance_scale": 3.5, "negative_prompt": "blurry"},
    ),
    "inpaint": (
        "stable-diffusion-3",
        "StableDiffusion3InpaintPipeline",
        PAINTED,
        {"image": PHOTO, "mask_image": MASK, "strength": 0.7, "guidance_scale": 3.5},
    ),
    "chroma img2img": (
        "chroma",
        "ChromaImg2ImgPipeline",
        PICTURE,
        {"image": PHOTO, "strength": 0.7, "guidance_scale": 3.5},
    ),
    "flux img2img": (
        "flux",
        "FluxImg2ImgPipeline",
        PICTURE,
        {"image": PHOTO, "strength": 0.7, "guidance_scale": 3.5},
    ),
    "flux inpaint": (
        "flux",
        "FluxInpaintPipeline",
        PAINTED,
        {"image": PHOTO, "mask_image": MASK, "strength": 0.7, "guidance_scale": 3.5},
    ),
    "fill": (
        "flux",
        "FluxFillPipeline",
        replace(PAINTED, strength=None),
        {"image": PHOTO, "mask_image": MASK, "guidance_scale": 3.5},
    ),
    "kontext": (
        "flux",
        "FluxKontextPipeline",
        EDIT,
        {"image": PHOTO, "guidance_scale": 3.5, "max_area": 80 * 112},
    ),
    "control": (
        "flux",
        "FluxControlPipeline",
        CONTROLLED,
        {"control_image": OTHER, "guidance_scale": 3.5},
    ),
    "control of a picture": (
        "flux",
        "FluxControlImg2ImgPipeline",
        replace(PICTURE, inputs=(IMAGE, CONTROL)),
        {"image": PHOTO, "control_image": OTHER, "strength": 0.7, "guidance_scale": 3.5},
    ),
    "image to video": (
        "ltx",
        "LTXImageToVideoPipeline",
        replace(CLIP, height=64, n=2),
        {"image": PHOTO, "num_frames": 9, "frame_rate": 16, "guidance_scale": 2.0},
    ),
    "a condition": (
        "ltx",
        "LTXConditionPipeline",
        replace(CLIP, height=64),
        {"image": PHOTO, "num_frames": 9, "frame_rate": 16, "guidance_scale": 2.0},
    ),
    "wan image to video": (
        "wan",
        "WanImageToVideoPipeline",
        replace(CLIP, negative_prompt="blurry"),
        {"image": PHOTO, "num_frames": 9, "guidance_scale": 2.0, "negative_prompt": "blurry"},
    ),
    "first and last": (
        "wan",
        "WanImageToVideoPipeline",
        replace(CLIP, inputs=(IMAGE, LAST)),
        {"image": PHOTO, "last_image": OTHER, "num_frames": 9, "guidance_scale": 2.0},
    ),
    "clip to clip": (
        "wan",
        "WanVideoToVideoPipeline",
        replace(VIDEO, n=1, inputs=(CLIP_IN,), strength=0.7, num_inference_steps=3),
        {"video": FRAMES, "strength": 0.7, "guidance_scale": 2.0},
    ),
    "a clip as a condition": (
        "ltx",
        "LTXConditionPipeline",
        replace(VIDEO, n=1, height=64, num_frames=17, inputs=(CLIP_IN,)),
        {"video": [FRAMES], "num_frames": 17, "frame_rate": 16, "guidance_scale": 2.0},
    ),
    "qwen img2img": (
        "qwen-image",
        "QwenImageImg2ImgPipeline",
        replace(PICTURE, negative_prompt="blurry"),
        {"image": PHOTO, "strength": 0.7, "true_cfg_scale": 3.5, "negative_prompt": "blurry"},
    ),
    "qwen inpaint": (
        "qwen-image",
        "QwenImageInpaintPipeline",
        PAINTED,
        {"image": PHOTO, "mask_image": MASK, "strength": 0.7},
    ),
    "qwen edit": (
        "qwen-image",
        "QwenImageEditPipeline",
        replace(EDIT, negative_prompt="blurry"),
        {"image": PHOTO, "true_cfg_scale": 3.5, "negative_prompt": "blurry"},
    ),
    "qwen edit of several": (
        "qwen-image",
        "QwenImageEditPlusPipeline",
        replace(EDIT, inputs=(IMAGE, MediaInput("image", png(OTHER))), negative_prompt="blurry"),
        {"image": [PHOTO, OTHER], "true_cfg_scale": 3.5, "negative_prompt": "blurry"},
    ),
    "qwen edit inpaint": (
        "qwen-image",
        "QwenImageEditInpaintPipeline",
        replace(PAINTED, negative_prompt="blurry"),
        {"image": SIZED, "mask_image": MASK, "strength": 0.7, "true_cfg_scale": 3.5, "negative_prompt": "blurry"},
    ),
    "flux 2 edit": (
        "flux-2",
        "Flux2Pipeline",
        replace(EDIT, inputs=(IMAGE, MediaInput("image", png(OTHER)))),
        {"image": [PHOTO, OTHER], "guidance_scale": 3.5},
    ),
    "fibo 2 edit": (
        "bria-fibo-2",
        "BriaFibo2Pipeline",
        replace(EDIT, negative_prompt="blurry"),
        {"image": PHOTO, "guidance_scale": 3.5, "negative_prompt": "blurry"},
    ),
    "joy edit": (
        "joy-image-edit",
        "JoyImageEditPipeline",
        replace(EDIT, negative_prompt="blurry"),
        {"image": PHOTO, "guidance_scale": 3.5, "negative_prompt": "blurry"},
    ),
    "joy edit of several": (
        "joy-image-edit-plus",
        "JoyImageEditPlusPipeline",
        replace(EDIT, inputs=(IMAGE, MediaInput("image", png(OTHER))), negative_prompt="blurry"),
        {"images": [PHOTO, OTHER], "guidance_scale": 3.5, "negative_prompt": "blurry"},
    ),
    "several": (
        "flux-2",
        "Flux2KleinPipeline",
        replace(EDIT, inputs=(IMAGE, MediaInput("image", png(OTHER)))),
        {"image": [PHOTO, OTHER], "guidance_scale": 3.5},
    ),
    "skyreels image to video": (
        "hunyuan-video",
        "HunyuanSkyreelsImageToVideoPipeline",
        replace(CLIP, num_frames=5, guidance_scale=6.0, negative_prompt="blurry"),
        {"image": PHOTO, "num_frames": 5, "true_cfg_scale": 6.0, "negative_prompt": "blurry"},
    ),
    "z-image img2img": (
        "z-image",
        "ZImageImg2ImgPipeline",
        PICTURE,
        {"image": SIZED, "strength": 0.7, "guidance_scale": 3.5},
    ),
    "z-image inpaint": (
        "z-image",
        "ZImageInpaintPipeline",
        PAINTED,
        {"image": SIZED, "mask_image": MASK, "strength": 0.7, "guidance_scale": 3.5},
    ),
    "kontext inpaint": (
        "flux",
        "FluxKontextInpaintPipeline",
        PAINTED,
        {"image": SIZED, "mask_image": MASK, "strength": 0.7, "guidance_scale": 3.5, "_auto_resize": False},
    ),
    "control of a painting": (
        "flux",
        "FluxControlInpaintPipeline",
        replace(PICTURE, inputs=(IMAGE, WHERE, CONTROL)),
        {"image": PHOTO, "mask_image": MASK, "control_image": OTHER, "strength": 0.7, "guidance_scale": 3.5},
    ),
    "klein inpaint": (
        "flux-2",
        "Flux2KleinInpaintPipeline",
        PAINTED,
        {"image": SIZED, "mask_image": MASK, "strength": 0.7, "guidance_scale": 3.5},
    ),
    "an instruction": (
        "bria",
        "BriaFiboEditPipeline",
        replace(EDIT, prompt='{"edit_instruction": "a cup of coffee"}', width=96, height=128, negative_prompt="blurry"),
        {"image": PHOTO, "guidance_scale": 3.5, "negative_prompt": "blurry"},
    ),
    "an instruction for a place": (
        "bria",
        "BriaFiboEditPipeline",
        replace(
            PAINTED,
            prompt='{"edit_instruction": "a cup"}',
            width=96,
            height=128,
            n=1,
            strength=None,
            negative_prompt="blurry",
        ),
        {"image": PHOTO, "mask": MASK, "guidance_scale": 3.5, "negative_prompt": "blurry"},
    ),
    "cogview control": (
        "cog-view",
        "CogView4ControlPipeline",
        CONTROLLED,
        {"control_image": OTHER, "guidance_scale": 3.5},
    ),
    "refiner": (
        "hunyuan-image",
        "HunyuanImageRefinerPipeline",
        replace(EDIT, width=96, height=128),
        {"image": PHOTO, "distilled_guidance_scale": 3.5},
    ),
    "flux controlnet": (
        "flux",
        "FluxControlNetPipeline",
        CONTROLLED,
        {"control_image": OTHER, "guidance_scale": 3.5},
    ),
    "flux controlnet of several kinds": (
        "flux",
        "FluxControlNetImg2ImgPipeline",
        replace(PICTURE, inputs=(IMAGE, CONTROL), extra_params={"control_mode": 2}),
        {"image": PHOTO, "control_image": OTHER, "strength": 0.7, "guidance_scale": 3.5, "control_mode": 2},
    ),
    "flux controlnet inpaint": (
        "flux",
        "FluxControlNetInpaintPipeline",
        replace(PICTURE, inputs=(IMAGE, WHERE, CONTROL)),
        {"image": PHOTO, "mask_image": MASK, "control_image": OTHER, "strength": 0.7, "guidance_scale": 3.5},
    ),
    "qwen controlnet": (
        "qwen-image",
        "QwenImageControlNetPipeline",
        replace(CONTROLLED, negative_prompt="blurry"),
        {"control_image": OTHER, "true_cfg_scale": 3.5, "negative_prompt": "blurry"},
    ),
    "qwen controlnet inpaint": (
        "qwen-image",
        "QwenImageControlNetInpaintPipeline",
        replace(PICTURES, inputs=(CONTROL, WHERE)),
        {"control_image": OTHER, "control_mask": MASK},
    ),
    "sd3 controlnet": (
        "stable-diffusion-3",
        "StableDiffusion3ControlNetPipeline",
        CONTROLLED,
        {"control_image": OTHER, "guidance_scale": 3.5},
    ),
    "sd3 controlnet inpaint": (
        "stable-diffusion-3",
        "StableDiffusion3ControlNetInpaintingPipeline",
        replace(PICTURES, inputs=(CONTROL, WHERE)),
        {"control_image": OTHER, "control_mask": MASK, "guidance_scale": 3.5},
    ),
    "hunyuan controlnet": (
        "hunyuan-dit",
        "HunyuanDiTControlNetPipeline",
        replace(CONTROLLED, extra_params={"use_resolution_binning": False}),
        {"control_image": OTHER, "guidance_scale": 3.5, "use_resolution_binning": False},
    ),
    "z-image controlnet": (
        "z-image",
        "ZImageControlNetPipeline",
        CONTROLLED,
        {"control_image": OTHER, "guidance_scale": 3.5},
    ),
    "z-image controlnet inpaint": (
        "z-image",
        "ZImageControlNetInpaintPipeline",
        replace(PICTURES, inputs=(IMAGE, WHERE, CONTROL)),
        {"image": PHOTO, "mask_image": MASK, "control_image": OTHER, "guidance_scale": 3.5},
    ),
}
"""For each a family, a pipeline of it, our request, and what the classic call is told."""
