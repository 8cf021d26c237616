"""The parameters of a request inside the file that it made: how they read, and where each format keeps them.

A request and the number of its picture come in; text, or what Pillow and PyAV write it with, goes out. The text is the
body of a REST request that draws the same again. It names no request and no time, so that the same request makes the
same bytes. For `workers.model.media`.
"""

import json
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from workers.messages import GenerationRequest

KEY = "parameters"
"""The PNG text chunk; other programs of the field use the same."""

COMMENT = "comment"
"""The tag of an MP4."""

EXIF, USER_COMMENT, UNICODE = 0x8769, 0x9286, b"UNICODE\0"
"""Where a WebP or JPEG keeps them: the sub-directory, its tag, and how the text is encoded (Exif 2.32, 4.6.5)."""

MOST_IN_JPEG = 65_000
"""Bytes of Exif data; a JPEG segment ends at 65,535, so longer parameters are left out."""


def parameters_text(request: GenerationRequest, number: int) -> str:
    """JSON of what made a picture or video, under the names of REST.

    Args:
        request: what was asked for.
        number: of the picture, 0 for the first; its own seed is told.
    """
    video, lossy = request.output_format == "mp4", request.output_format in ("jpeg", "webp")
    told: dict[str, Any] = {
        "model": request.model,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "size": f"{request.width}x{request.height}",
        "num_inference_steps": request.num_inference_steps,
        "true_cfg_scale" if request.true_cfg else "guidance_scale": request.guidance_scale,
        "guidance_scale_2": request.guidance_scale_2 if video else None,
        "flow_shift": request.flow_shift,
        "strength": request.strength,
        "seed": request.all_seeds[number],
        "num_frames": request.num_frames if video else None,
        "fps": request.fps if video else None,
        "loras": [{"name": name, "scale": scale} for name, scale in request.loras] or None,
        "extra_params": dict(request.extra_params) or None,
        "output_format": None if video else request.output_format,
        "output_compression": request.output_compression if lossy else None,
    }
    text = json.dumps({name: value for name, value in told.items() if value is not None}, ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode()  # a lone surrogate is in no encoding


def saved_with(text: str, output_format: str) -> dict[str, Any]:
    """Arguments of Pillow's `save` that write the text into a picture of this format; none if it has no room."""
    if output_format == "png":
        info = PngInfo()
        info.add_itxt(KEY, text)
        return {"pnginfo": info}
    exif = Image.Exif()
    exif.get_ifd(EXIF)[USER_COMMENT] = UNICODE + text.encode("utf-16-le")  # the order that Pillow writes
    written = exif.tobytes()
    return {} if output_format == "jpeg" and len(written) > MOST_IN_JPEG else {"exif": written}
