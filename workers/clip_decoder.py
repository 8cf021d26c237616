"""Decodes a clip that a caller has sent, which may be hostile: an MP4 at standard input, an animated PNG at standard
output.

`python clip_decoder.py MOST ASKED`: a process of its own, with little memory and time, started by
`service.api.clips`: what a decoder of videos does with a hostile file ends there. Its exit code is 0, or `REFUSED` with
the reason at standard error; any other one says that the file has broken the decoder.
"""

import io
import resource
import sys
from collections.abc import Iterator

import av
from av.error import FFmpegError
from PIL import Image
from PIL.PngImagePlugin import PngInfo

REFUSED = 3

CODECS = frozenset({"h264", "hevc", "av1", "vp9", "mpeg4"})

MAX_PIXELS = 1 << 22
"""Of one frame."""

MOST_PIXELS = 1 << 27
"""Of all frames that are read: 145 of 1280x720, each of which takes three bytes here."""

CUT = "cut"
"""A text in the PNG of a clip that has more frames than these."""

MEMORY_BYTES = 4 << 30
CPU_S = 60


class ClipError(ValueError):
    """The clip is not taken; says why."""


def decode(data: bytes, most_frames: int, asked_frames: int | None = None) -> bytes:
    """The first frames of an MP4, upright, in colors, without loss.

    Args:
        data: the file.
        most_frames: later ones are not read.
        asked_frames: the clip ends after these where it has too many pixels, or cannot be decoded; None: nowhere.

    Raises:
        ClipError: it is no clip that is taken.
        FFmpegError: it cannot be decoded.
    """
    with av.open(io.BytesIO(data), "r", format="mp4") as container:
        if not container.streams.video:
            raise ClipError("the clip has no video")
        stream = container.streams.video[0]
        codec = stream.codec_context.name
        if codec not in CODECS:
            raise ClipError(f"the clip's codec is {codec}; taken are {', '.join(sorted(CODECS))}")
        _check_size(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.thread_count = 1
        frames, is_cut = _first(_frames(container.decode(stream)), most_frames, asked_frames or most_frames)
    if not frames:
        raise ClipError("the clip has no frames")
    buffer = io.BytesIO()
    said = PngInfo()
    if is_cut:
        said.add_text(CUT, "yes")
    # Without a duration: with one, Pillow would make one frame of two that are equal.
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:], compress_level=1, pnginfo=said)
    return buffer.getvalue()


def _first(frames: Iterator[Image.Image], most: int, asked: int) -> tuple[list[Image.Image], bool]:
    """So many frames, and whether there are more."""
    found: list[Image.Image] = []
    try:
        for frame in frames:
            if len(found) == most:
                return found, True
            found.append(frame)
    except (ClipError, FFmpegError):
        if len(found) < asked:
            raise
        return found, True
    return found, False


def _frames(decoded: Iterator[av.VideoFrame]) -> Iterator[Image.Image]:
    pixels, size = 0, None
    for number, frame in enumerate(decoded, 1):
        _check_size(frame.width, frame.height)
        if size not in (None, (frame.width, frame.height)):
            raise ClipError("the clip changes its size")
        size = frame.width, frame.height
        pixels += frame.width * frame.height
        if pixels > MOST_PIXELS:
            raise ClipError(
                f"the first {number} frames have more than {MOST_PIXELS} pixels together; "
                "scale the clip down, or ask for fewer frames"
            )
        yield frame.to_image().rotate(frame.rotation, expand=True)  # type: ignore[no-untyped-call]


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ClipError(f"the clip has {width}x{height} pixels; 1 to {MAX_PIXELS} are allowed in a frame")


def main() -> int:
    """Called by the command."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    av.logging.set_level(None)
    try:
        made = decode(sys.stdin.buffer.read(), int(sys.argv[1]), int(sys.argv[2]))
    except (ClipError, FFmpegError, MemoryError, OverflowError) as error:
        said = str(error) if isinstance(error, ClipError) else f"the clip cannot be decoded: {str(error)[:100]}"
        print(said, file=sys.stderr)
        return REFUSED
    sys.stdout.buffer.write(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
