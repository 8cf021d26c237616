"""Clips that callers send are decoded to the frame within limits, or refused as their mistake; whatever they are."""

import io
import random
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from service.api import clips
from service.api.clips import decode_clip, frames_of
from service.api.pictures import size_of
from workers import clip_decoder
from workers.clip_decoder import ClipError, decode
from workers.errors import InvalidParameter
from workers.messages import MediaInput
from workers.model.picture_inputs import is_cut, read_clip


def painted(count: int, width: int = 48, height: int = 32, still: bool = False) -> list[Image.Image]:
    """Frames that differ from each other, unless they are still."""
    y, x = np.mgrid[:height, :width]
    shifts = [0 if still else 20 * i for i in range(count)]
    return [
        Image.fromarray(np.stack([(x * 4 + shift) % 256, y * 6 % 256, 0 * x + shift % 256], -1).astype(np.uint8))
        for shift in shifts
    ]


def mp4(frames: list[Image.Image], codec: str = "libx264", **options: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=8, options=options)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))  # type: ignore[no-untyped-call]
        container.mux(stream.encode(None))
    return buffer.getvalue()


CLIP = mp4(painted(6))


def decoded(data: bytes) -> list[Image.Image]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


@pytest.mark.parametrize("still", [False, True])
def test_the_frames_are_those_of_the_clip(still: bool) -> None:
    clip = mp4(painted(6, still=still))
    made = decode_clip("video", clip, 100)
    given = MediaInput("video", made)
    assert (frames_of(made), size_of(given)) == (6, (48, 32))
    for frame, expected in zip(read_clip(given), decoded(clip), strict=True):
        assert frame.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("most", "count"), [(1, 1), (3, 3), (6, 6), (7, 6)])
def test_only_so_many_frames_are_read(most: int, count: int) -> None:
    made = decode(CLIP, most)
    assert frames_of(made) == count == len(read_clip(MediaInput("video", made)))


WRONG = {
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "a clip must be an MP4"),
    "nothing": (b"", "a clip must be an MP4"),
    "a beginning": (CLIP[:60], "cannot be decoded"),
    "no data": (CLIP[:4] + b"ftypisom" + bytes(200), "cannot be decoded"),
    "a codec": (mp4(painted(2), "mjpeg"), "the clip's codec is mjpeg; taken are"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_clip_is_refused_by_name(name: str) -> None:
    data, said = WRONG[name]
    with pytest.raises(InvalidParameter, match=said) as refused:
        decode_clip("video", data, 9)
    assert (refused.value.param, refused.value.code) == ("video", "invalid_clip")


def test_a_clip_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_decoder, "MAX_PIXELS", 48 * 32 - 1)
    with pytest.raises(ClipError, match="48x32 pixels; 1 to 1535 are allowed in a frame"):
        decode(CLIP, 9)
    monkeypatch.setattr(clip_decoder, "MAX_PIXELS", 1 << 22)
    monkeypatch.setattr(clip_decoder, "MOST_PIXELS", 48 * 32 * 3)
    assert frames_of(decode(CLIP, 3)) == 3
    with pytest.raises(ClipError, match="the first 4 frames have more than 4608 pixels together"):
        decode(CLIP, 4)
    assert frames_of(decode(CLIP, 6, asked_frames=3)) == 3


@pytest.mark.parametrize(("most", "is_cut_"), [(5, True), (6, False), (7, False)])
def test_a_clip_of_more_frames_than_are_read_says_so(most: int, is_cut_: bool) -> None:
    assert is_cut(MediaInput("video", decode_clip("video", CLIP, most, 2))) == is_cut_


def test_a_decoder_that_breaks_or_takes_too_long_is_the_clips_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "SECONDS", 0.01)
    with pytest.raises(InvalidParameter, match=r"within 0\.01 s"):
        decode_clip("video", CLIP, 9)
    monkeypatch.setattr(clips, "SECONDS", 60)
    monkeypatch.setattr(clips, "DECODER", "absent.py")
    with pytest.raises(InvalidParameter, match=r"the clip cannot be decoded$"):
        decode_clip("video", CLIP, 9)


def check_damaged(count: int, seed: int) -> int:
    """How many of so many damaged clips were taken. Anything else than a refusal is an error of this server."""
    drawn, taken = random.Random(seed), 0
    for _ in range(count):
        data = bytearray(CLIP)
        for _ in range(drawn.choice((1, 3, 30))):
            data[drawn.randrange(8, len(data))] = drawn.randrange(256)
        data = data[: drawn.choice((len(data), drawn.randrange(20, len(data))))]
        try:
            decode_clip("video", bytes(data), 9)
            taken += 1
        except InvalidParameter as refused:
            assert refused.code == "invalid_clip"
    return taken


def test_damaged_clips_are_the_callers_mistake() -> None:
    assert 0 < check_damaged(8, seed=1) < 8


@pytest.mark.soak
def test_three_hundred_damaged_clips_are_the_callers_mistake() -> None:
    assert 30 < check_damaged(300, seed=2) < 290
