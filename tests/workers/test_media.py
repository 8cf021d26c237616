"""Files of pictures and videos: what is in them, and that the same frames make the same bytes."""

import io
from dataclasses import replace

import av
import numpy
import pytest
from PIL import Image

from workers.messages import GenerationRequest
from workers.model.media import encode, what_differs

FILM = GenerationRequest("a", "film", "a cup of coffee", 64, 64, num_inference_steps=1, seed=1, num_frames=5, fps=8)


@pytest.fixture
def frames() -> list[Image.Image]:
    """Five frames of soft colors that turn: what the encoder looks ahead for."""
    random = numpy.random.default_rng(0)
    colors = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=numpy.uint8)).resize((64, 64))
    return [colors.rotate(3 * i) for i in range(5)]


def test_the_same_frames_make_the_same_file(frames: list[Image.Image]) -> None:
    """Also where memory is not as it was: x264 has read some that nobody had written."""
    random = numpy.random.default_rng(1)
    used: list[bytes] = []
    files = set()
    for _ in range(40):
        used.append(random.bytes(int(random.integers(100, 200_000))))
        if len(used) > 20:
            used.pop(int(random.integers(20)))
        files.add(encode(frames, FILM))
    assert len(files) == 1


def test_a_video_has_the_frames_and_their_rate(frames: list[Image.Image]) -> None:
    with av.open(io.BytesIO(encode(frames, FILM))) as video:
        (stream,) = video.streams.video
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 8)
        found = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
    assert len(found) == 5
    for frame, drawn in zip(found, frames, strict=True):
        assert (
            abs(frame.astype(int) - numpy.asarray(drawn).astype(int)).mean() < 10
        )  # of 255: colors are halved in resolution


def test_what_was_made_otherwise_than_asked_for_is_told(frames: list[Image.Image]) -> None:
    picture = replace(FILM, num_frames=1)
    assert what_differs(frames, FILM) == what_differs(frames[0], picture) == []
    assert what_differs(frames[:1], FILM) == ["num_frames: the model made 1, not 5"]
    assert what_differs(frames[0], replace(picture, height=48)) == ["size: the model made 64x64, not 64x48"]
