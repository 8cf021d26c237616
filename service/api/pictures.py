"""Reads the pictures and clips that callers send, which may be hostile: bytes in, `MediaInput`s out. For both APIs.

A picture is checked before it is decoded: its kind by its first bytes, its size by its header. A few threads decode
pictures and encode them again as plain PNGs, so that nothing else of the caller's file reaches the ranks. No URL is
fetched.
"""

import asyncio
import base64
import binascii
import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageOps

from service.api.clips import decode_clip
from service.api.observed import key_name
from workers.errors import InvalidParameter, QueueFull
from workers.messages import MediaInput, MediaRole

MAX_PIXELS = 1 << 25
"""The most pixels of one picture. Decoded, each takes four bytes."""

MOST_PIXELS = 2 * MAX_PIXELS
"""The most pixels of all pictures of a request together."""

MAX_EDGE = 1 << 14
"""The most pixels of the longer edge."""

MAX_SCANS = 100
"""The most scans of a JPEG. A progressive one has about ten; each is a pass over all pixels, and may take few bytes."""

THREADS = 2

MOST_WAITING, MOST_OF_ONE = 32, 8
"""The most requests of one gateway whose pictures are being decoded or wait for it: of all callers, and of one key."""

KINDS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF"}
"""The first bytes of a file, by Pillow's names of formats."""

ALLOWED = "a picture must be a PNG, JPEG or WebP"

_threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")
_waiting: Counter[str] = Counter()
"""By the names of keys."""


async def read_pictures(
    files: Sequence[tuple[MediaRole, bytes]], frames: tuple[int, int] = (1, 1)
) -> tuple[MediaInput, ...]:
    """The inputs of a request, decoded and made alike.

    Args:
        files: as the caller sent them, with their roles.
        frames: for a clip, the most frames to read, and the least number that must be readable.

    Raises:
        InvalidParameter: a file is not an accepted picture, or a mask has another size than its image.
        QueueFull: too many pictures are being decoded.
    """
    key = key_name.get()
    if _waiting.total() >= MOST_WAITING:
        raise QueueFull(f"{MOST_WAITING} requests wait for their pictures to be decoded; try again later")
    if key and _waiting[key] >= MOST_OF_ONE:
        raise QueueFull(f"{MOST_OF_ONE} of your requests wait for their pictures to be decoded; try again later")

    def end(decoding: "asyncio.Future[tuple[MediaInput, ...]]") -> None:
        _waiting[key] -= 1
        if not decoding.cancelled():
            decoding.exception()  # retrieved here, because a caller that has left does not

    work = _threads.submit(decode, files, frames)
    _waiting[key] += 1
    decoding = asyncio.wrap_future(work)
    decoding.add_done_callback(end)  # not when the caller leaves: a thread that has begun goes on
    try:
        return await asyncio.shield(decoding)
    except asyncio.CancelledError:
        work.cancel()
        raise


def decode(files: Sequence[tuple[MediaRole, bytes]], frames: tuple[int, int] = (1, 1)) -> tuple[MediaInput, ...]:
    """Like `read_pictures`, in this thread.

    Raises:
        InvalidParameter: see `read_pictures`.
    """
    inputs: list[MediaInput] = []
    left = MOST_PIXELS
    for role, data in files:
        if role == "video":
            inputs.append(MediaInput(role, decode_clip(role, data, *frames)))
            continue
        made = MediaInput(role, _converted(role, data, left))
        width, height = size_of(made)
        left -= width * height
        if role == "mask" and size_of(made) != size_of(inputs[0]):
            (width, height), (wide, high) = size_of(inputs[0]), size_of(made)
            raise _invalid("mask", f"the mask has {wide}x{high} pixels, the image {width}x{height}; make them equal")
        inputs.append(made)
    return tuple(inputs)


def size_of(given: MediaInput) -> tuple[int, int]:
    """Width and height in pixels, from the header of its PNG."""
    return int.from_bytes(given.data[16:20]), int.from_bytes(given.data[20:24])


def from_data_url(url: str) -> bytes:
    """The bytes of a `data:` URL in base64.

    Raises:
        ValueError: it is another URL, or malformed.
    """
    head, comma, data = url.partition(",")
    if not head.lower().startswith("data:"):
        raise ValueError(
            "must be a file of a form, or a data: URL such as data:image/png;base64,...; no URL is fetched"
        )
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("must be a data: URL in base64, such as data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is a data: URL whose data is no base64") from None


def _converted(param: MediaRole, data: bytes, left: int) -> bytes:
    """The first frame of a picture, upright, of at most `left` pixels, in the mode of its role, as PNG.

    Raises:
        InvalidParameter: it is not accepted.
    """
    kind = next((kind for kind, start in KINDS.items() if data.startswith(start)), None)
    if kind is None or (kind == "WEBP" and data[8:12] != b"WEBP"):
        raise _invalid(param, f"{ALLOWED}; this one begins with none of their signatures")
    if kind == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise _invalid(param, f"the JPEG has more than {MAX_SCANS} scans; save it again")
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as opened:
            width, height = opened.size
            if width * height <= min(MAX_PIXELS, left) and max(width, height) <= MAX_EDGE:
                opened.load()
                picture = ImageOps.exif_transpose(opened)
                return _png(_as_mask(picture) if param == "mask" else _on_white(picture))
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(param, "far too many") from None
    except Exception as error:  # Pillow's decoders raise much
        raise _invalid(param, f"the {kind} cannot be decoded: {str(error)[:100]}") from None
    if left < width * height <= MAX_PIXELS:
        said = f"the pictures have more than {MOST_PIXELS} pixels together; scale them down, or send fewer"
        raise InvalidParameter(param, said, "picture_too_large")
    raise _too_large(param, f"{width}x{height}")


def _on_white(picture: Image.Image) -> Image.Image:
    """The picture in color, its transparent parts laid over white."""
    if not picture.has_transparency_data:
        return _in_eight_bits(picture).convert("RGB")
    colors = _in_eight_bits(picture).convert("RGBA")
    ground = Image.new("RGBA", colors.size, "white")
    ground.alpha_composite(colors)
    return ground.convert("RGB")


def _as_mask(picture: Image.Image) -> Image.Image:
    """A mask in gray, white where to draw anew. If it has transparent parts, these are where, as in OpenAI's masks."""
    if picture.has_transparency_data:
        alpha = _in_eight_bits(picture).convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return ImageOps.invert(alpha)
    return _in_eight_bits(picture).convert("L")


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """The picture in 8 bits. Pillow has 16 bits only in gray, and clips them at 255 when it converts."""
    if not picture.mode.startswith("I"):
        return picture
    return picture.convert("I").point(lambda level: level * (1 / 256)).convert("L")


def _png(picture: Image.Image) -> bytes:
    picture.info.clear()  # what else was in the caller's file, such as a color profile
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _too_large(param: MediaRole, size: str) -> InvalidParameter:
    text = (
        f"the picture has {size} pixels, at most {MAX_PIXELS} are allowed, and {MAX_EDGE} along an edge; scale it down"
    )
    return InvalidParameter(param, text, "picture_too_large")


def _invalid(param: MediaRole, message: str) -> InvalidParameter:
    return InvalidParameter(param, message, "invalid_picture")
