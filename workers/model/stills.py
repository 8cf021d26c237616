"""Pictures of a finished video: a small one of its first frame, and a sheet of frames from all of it.

Called by the gateway when a caller asks for them. Without torch.
"""

import io
import math
from typing import IO, Any

import av
from PIL import Image

THUMBNAIL_EDGE, SHEET_EDGE = 480, 240
"""Pixels of the longer edge, of the first frame and of each frame of a sheet."""

MOST_FRAMES = 25
"""Frames of a sheet: five rows of five."""


def thumbnail(video: IO[bytes]) -> bytes:
    """The first frame as a WebP.

    Args:
        video: an MP4, open for reading.
    """
    with av.open(video, "r") as container:
        frame = next(container.decode(video=0))
        return _encoded(_within(_picture(frame), THUMBNAIL_EDGE), "webp")


def spritesheet(video: IO[bytes]) -> bytes:
    """Frames at equal distances, the first and the last among them, in rows from left to right; a JPEG.

    Args:
        video: an MP4, open for reading.
    """
    with av.open(video, "r") as container:
        stream = container.streams.video[0]
        count = min(MOST_FRAMES, max(1, stream.frames))
        wanted = {round(number * (stream.frames - 1) / max(1, count - 1)) for number in range(count)}
        frames = [
            _within(_picture(frame), SHEET_EDGE)
            for number, frame in enumerate(container.decode(stream))
            if number in wanted
        ]
    columns = math.ceil(math.sqrt(len(frames)))
    width, height = frames[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(frames) / columns) * height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % columns * width, number // columns * height))
    return _encoded(sheet, "jpeg")


def _picture(frame: Any) -> Image.Image:
    made: Image.Image = frame.to_image()
    return made


def _within(picture: Image.Image, edge: int) -> Image.Image:
    picture.thumbnail((edge, edge))  # keeps the shape, and enlarges nothing
    return picture


def _encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=85)
    return buffer.getvalue()
