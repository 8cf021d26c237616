"""Pictures of a finished video."""

import io

import pytest
from PIL import Image

from workers.messages import GenerationRequest
from workers.model.media import encode
from workers.model.stills import MOST_FRAMES, SHEET_EDGE, THUMBNAIL_EDGE, spritesheet, thumbnail


def film(frames: int, width: int = 640, height: int = 320) -> io.BytesIO:
    """A video that becomes redder from frame to frame."""
    pictures = [
        Image.new("RGB", (width, height), (number * 255 // max(1, frames - 1), 0, 0)) for number in range(frames)
    ]
    request = GenerationRequest("a", "film", "a", width, height, 1, seed=1, num_frames=frames, output_format="mp4")
    return io.BytesIO(encode(pictures, request))


def red(picture: Image.Image, x: int, y: int) -> int:
    pixel = picture.convert("RGB").getpixel((x, y))
    assert isinstance(pixel, tuple)
    return int(pixel[0])


def test_a_thumbnail_is_the_first_frame_made_smaller() -> None:
    picture = Image.open(io.BytesIO(thumbnail(film(9))))
    assert (picture.format, picture.size) == ("WEBP", (THUMBNAIL_EDGE, THUMBNAIL_EDGE // 2))
    assert red(picture, 100, 100) < 20
    assert Image.open(io.BytesIO(thumbnail(film(1, 64, 32)))).size == (64, 32)  # nothing is enlarged


@pytest.mark.parametrize(("frames", "columns", "rows"), [(1, 1, 1), (5, 3, 2), (81, 5, 5)])
def test_a_sheet_has_frames_from_all_of_it(frames: int, columns: int, rows: int) -> None:
    sheet = Image.open(io.BytesIO(spritesheet(film(frames))))
    width, height = SHEET_EDGE, SHEET_EDGE // 2
    assert (sheet.format, sheet.size) == ("JPEG", (columns * width, rows * height))
    shown = min(frames, MOST_FRAMES)
    reds = [red(sheet, i % columns * width + 20, i // columns * height + 20) for i in range(shown)]
    assert reds == sorted(reds)
    assert reds[0] < 20
    assert frames == 1 or reds[-1] > 235
