"""Files of pictures and videos: what is in them, and that the same frames make the same bytes."""

import io
import json
from dataclasses import replace
from typing import Any, cast

import av
import numpy
import pytest
from PIL import Image

from workers.messages import GenerationRequest, OutputFormat
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


PICTURE = replace(FILM, num_frames=1, seed=7, n=2, prompt='a "cup", \u676f \U0001f600', loras=(("ink", 0.5),))


def parameters(file: bytes) -> dict[str, Any]:
    """The parameters in a file, as another program reads them."""
    if file[4:8] == b"ftyp":
        with av.open(io.BytesIO(file)) as video:
            return cast(dict[str, Any], json.loads(video.metadata["comment"]))
    picture = Image.open(io.BytesIO(file))
    if picture.format == "PNG":
        return cast(dict[str, Any], json.loads(picture.text["parameters"]))  # type: ignore[attr-defined]
    written = picture.getexif().get_ifd(0x8769)[0x9286]
    assert written.startswith(b"UNICODE\0")
    return cast(dict[str, Any], json.loads(written[8:].decode("utf-16-le")))


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_a_picture_has_the_parameters_that_draw_it_again(frames: list[Image.Image], kind: OutputFormat) -> None:
    request = replace(PICTURE, output_format=kind, output_compression=90)
    told = parameters(encode(frames[0], request, 1))
    own = {"output_compression": 90} if kind != "png" else {}
    assert told == own | {
        "model": "film",
        "prompt": PICTURE.prompt,
        "size": "64x64",
        "num_inference_steps": 1,
        "guidance_scale": 4.0,
        "seed": 8,  # of the second picture
        "loras": [{"name": "ink", "scale": 0.5}],
        "output_format": kind,
    }


def test_a_video_has_the_parameters_that_draw_it_again(frames: list[Image.Image]) -> None:
    told = parameters(encode(frames, replace(FILM, output_format="mp4", guidance_scale_2=3.0, negative_prompt="fog")))
    assert (told["num_frames"], told["fps"], told["guidance_scale_2"], told["negative_prompt"]) == (5, 8, 3.0, "fog")
    assert (told["seed"], "output_format" in told) == (1, False)


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg", "mp4"])
def test_files_without_parameters_differ_in_nothing_else(frames: list[Image.Image], kind: OutputFormat) -> None:
    request = replace(FILM if kind == "mp4" else PICTURE, output_format=kind)
    made = frames if kind == "mp4" else frames[0]
    full, bare = encode(made, request), encode(made, replace(request, embed_metadata=False))
    assert b"steps" in full.replace(b"\0", b"") and b"steps" not in bare.replace(b"\0", b"")
    assert decoded(full) == decoded(bare)


def decoded(file: bytes) -> list[bytes]:
    """The pixels of a picture or of each frame."""
    if file[4:8] != b"ftyp":
        return [Image.open(io.BytesIO(file)).convert("RGB").tobytes()]
    with av.open(io.BytesIO(file)) as video:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in video.decode(video=0)]


def test_parameters_for_which_a_jpeg_has_no_room_are_left_out(frames: list[Image.Image]) -> None:
    long = replace(PICTURE, prompt="\U0001f600" * 32_000)
    assert parameters(encode(frames[0], long))["prompt"] == long.prompt
    bare = Image.open(io.BytesIO(encode(frames[0], replace(long, output_format="jpeg"))))
    assert dict(bare.getexif()) == {}


def test_text_that_no_encoding_has_is_written_as_an_escape(frames: list[Image.Image]) -> None:
    assert parameters(encode(frames[0], replace(PICTURE, prompt="a\udc80b")))["prompt"] == "a\udc80b"
