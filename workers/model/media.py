"""Encodes pictures and videos as files. Called on rank 0 when a request's latents are decoded.

`workers.model.denoising` calls `what_differs`; `service.cli.pictures` calls `as_png`.
"""

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from workers.messages import GenerationRequest
from workers.model.embedded_parameters import COMMENT, parameters_text, saved_with


def encode(made: Image.Image | Sequence[Image.Image], request: GenerationRequest, number: int = 0) -> bytes:
    """Encode a picture or video in the file format that the request names, with its parameters if they are wanted.

    Args:
        made: an RGB picture, or the RGB frames of a video.
        request: what was asked for.
        number: of the picture, 0 for the first.
    """
    text = parameters_text(request, number) if request.embed_metadata else ""
    if isinstance(made, Image.Image):
        return _picture(made, request.output_format, request.output_compression, text)
    return _video(made, request.fps, text)


def what_differs(made: Image.Image | Sequence[Image.Image], request: GenerationRequest) -> list[str]:
    """Warnings if a picture or video is not as requested: some pipelines choose sizes by themselves."""
    frames = [made] if isinstance(made, Image.Image) else made
    (width, height), found = frames[0].size, []
    if (width, height) != (request.width, request.height):
        found.append(f"size: the model made {width}x{height}, not {request.width}x{request.height}")
    if len(frames) != request.num_frames:
        found.append(f"num_frames: the model made {len(frames)}, not {request.num_frames}")
    return found


def as_png(picture: bytes) -> bytes:
    """The same picture as a PNG."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(buffer, format="png")
    return buffer.getvalue()


def _picture(picture: Image.Image, output_format: str, compression: int, text: str) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if output_format == "png" else {"quality": compression}
    picture.save(buffer, format=output_format, **options, **(saved_with(text, output_format) if text else {}))
    return buffer.getvalue()


def _video(frames: Sequence[Image.Image], fps: int, text: str = "") -> bytes:
    """H.264 in MP4, the same bytes for the same frames and text.

    x264's macroblock tree is off: its vector code reads memory that was never written, and equal frames of one process
    became up to six different files.
    """
    import av  # here, because models of pictures do not need it

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        if text:
            container.metadata[COMMENT] = text
        stream: Any = container.add_stream("libx264", rate=fps, options={"crf": "18", "x264-params": "mbtree=0"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"  # every player decodes it
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))  # type: ignore[no-untyped-call]
        container.mux(stream.encode(None))
    return buffer.getvalue()
