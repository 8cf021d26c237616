"""Pictures that no caller should send, and those that are only unusual: for tests of what reads them."""

import io
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image


def file(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def colored(width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    """A picture whose corners differ."""
    picture = Image.linear_gradient("L").resize((width, height)).rotate(20)
    return Image.merge("RGB", (picture, picture.rotate(180), Image.new("L", picture.size, 90))).convert(mode)


def chunk(name: bytes, data: bytes) -> bytes:
    """A part of a PNG, with its checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes, depth: int = 8, color: int = 2, *extra: bytes) -> bytes:
    """A PNG that says what it likes: its header, more parts, and the data that may not fit it."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg_of_many_scans(scans: int) -> bytes:
    """A progressive JPEG that passes over its pixels again and again."""
    plain = file(colored(), "JPEG", progressive=True)
    first = plain.index(b"\xff\xda")
    second = plain.index(b"\xff\xda", first + 2)
    return plain[:second] + plain[first:second] * scans + plain[second:]


UNUSUAL: dict[str, bytes] = {
    "gray": file(colored(mode="L")),
    "two levels": file(colored(mode="1")),
    "palette": file(colored(mode="P")),
    "palette with alpha": file(colored(mode="P"), transparency=3),
    "palette with alphas": file(colored(mode="RGBA").quantize(16)),
    "gray with alpha": file(colored(mode="LA")),
    "colors with alpha": file(colored(mode="RGBA")),
    "16 bit gray": file(colored(mode="L").convert("I").point(lambda level: level * 257).convert("I;16")),
    "16 bit colors": png(2, 1, zlib.compress(b"\0" + b"\x80\0" * 6), 16),
    "16 bit colors with alpha": png(1, 1, zlib.compress(b"\0" + b"\x80\0" * 4), 16, 6),
    "CMYK": file(colored(mode="CMYK"), "JPEG"),
    "gray JPEG": file(colored(mode="L"), "JPEG"),
    "progressive": file(colored(), "JPEG", progressive=True),
    "WebP": file(colored(), "WEBP"),
    "WebP with alpha": file(colored(mode="RGBA"), "WEBP", lossless=True),
    "animated WebP": file(colored(), "WEBP", save_all=True, append_images=[colored().rotate(90)], duration=10),
    "animated PNG": file(colored(), "PNG", save_all=True, append_images=[colored().rotate(90)], duration=10),
    "a single pixel": file(colored(1, 1)),
    "long and thin": file(colored(16384, 1)),
    "bytes after its end": file(colored()) + b"GIF89a" * 100,
}
"""What is taken."""

HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "text": b"a cup of coffee",
    "a signature alone": b"\x89PNG\r\n\x1a\n",
    "half a signature": b"\x89PNG",
    "GIF": file(colored(), "GIF"),
    "TIFF": file(colored(), "TIFF"),
    "BMP": file(colored(), "BMP"),
    "PDF": file(colored(), "PDF"),
    "EPS": file(colored(), "EPS"),
    "ICO": file(colored(), "ICO"),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "RIFF that is no WebP": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
    "a bomb of 4 gigapixels": png(65535, 65535, zlib.compress(bytes(1 << 20), 9)),
    "a bomb of 2 gigapixels each way": png(2**31 - 1, 2**31 - 1, b""),
    "just too many pixels": file(Image.new("1", (1 << 13, (1 << 12) + 1))),
    "too long": png((1 << 14) + 1, 1, b""),
    "no width": png(0, 16, zlib.compress(b"")),
    "no height": png(16, 0, zlib.compress(b"")),
    "fewer pixels than it says": png(4096, 4096, zlib.compress(bytes(1000))),
    "data that is not compressed": png(16, 16, b"\xff" * 100),
    "a text that unpacks to 200 MB": png(
        1, 1, zlib.compress(bytes(4)), 8, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20), 9))
    ),
    "a profile that unpacks to 200 MB": png(
        1, 1, b"", 8, 2, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200 << 20), 9))
    ),
    "more alphas than colors": png(
        16, 16, zlib.compress(bytes(17 * 16)), 8, 3, chunk(b"PLTE", bytes(6)), chunk(b"tRNS", bytes(300))
    ),
    "a depth that is none": png(16, 16, zlib.compress(bytes(1000)), 7),
    "a large JPEG": file(colored(), "JPEG").replace(b"\x00\x10\x00\x18\x03", b"\xff\xff\xff\xff\x03", 1),
    "a JPEG of many scans": jpeg_of_many_scans(500),
    "a large WebP": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0\xff\xff\xff\xff\xff\xff",
}
"""What is refused."""

TOO_LARGE = frozenset(
    {
        "a bomb of 4 gigapixels",
        "a bomb of 2 gigapixels each way",
        "just too many pixels",
        "too long",
        "a large JPEG",
        "a large WebP",
    }
)
"""Of these, what says of itself that it has too many pixels."""


def damaged(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """So many files that were pictures: cut, with bytes changed, one within another, or made of two."""
    source, names = random.Random(seed), [*UNUSUAL]
    for number in range(count):
        name = source.choice(names)
        whole = UNUSUAL[name]
        place = source.randrange(len(whole))
        changed = bytearray(whole)
        for _ in range(source.choice((1, 2, 20))):
            changed[source.randrange(len(whole))] = source.randrange(256)
        kind, made = source.choice([
            ("cut", whole[:place]),
            ("changed", bytes(changed)),
            ("changed behind its signature", whole[:16] + bytes(changed)[16:]),
            ("with a hole", whole[:place] + whole[place + source.randrange(1, 40) :]),
            ("doubled", whole[:place] + whole),
            ("crossed", whole[:place] + UNUSUAL[source.choice(names)][place:]),
            ("noise", whole[:12] + source.randbytes(60)),
        ])  # fmt: skip
        if source.random() < 0.5:  # else most damage goes no further than the first wrong checksum
            made = with_checksums(made)
        yield f"{number}: {name}, {kind}", made


def with_checksums(data: bytes) -> bytes:
    """A damaged PNG whose parts have the checksums of what they hold now; other files as they are."""
    head, at, made = data[:8], 8, bytearray(data)
    while head == b"\x89PNG\r\n\x1a\n" and at + 12 <= len(made):
        end = at + 8 + int.from_bytes(made[at : at + 4], "big")
        if end + 4 > len(made):
            break
        made[end : end + 4] = struct.pack(">I", zlib.crc32(made[at + 4 : end]))
        at = end + 4
    return bytes(made)
