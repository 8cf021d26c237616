"""Pictures that callers send are decoded within limits, or refused as their mistake; whatever they are."""

import asyncio
import io
import random
import threading
import time
import tracemalloc
from typing import Any

import psutil
import pytest
from PIL import Image

from service.api import pictures
from service.api.observed import key_name
from service.api.pictures import MAX_PIXELS, decode, from_data_url, read_pictures, size_of
from tests.support.hostile import HOSTILE, TOO_LARGE, UNUSUAL, colored, damaged, file
from workers.errors import InvalidParameter, QueueFull
from workers.messages import MediaInput, MediaRole


def opened(given: MediaInput) -> Image.Image:
    return Image.open(io.BytesIO(given.data))


def gray(value: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("L", size, value)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_are_taken(name: str) -> None:
    image, mask = decode([("image", UNUSUAL[name]), ("mask", UNUSUAL[name])])
    for given, mode in ((image, "RGB"), (mask, "L")):
        picture = opened(given)
        assert (picture.format, picture.mode, picture.info) == ("PNG", mode, {})
        assert size_of(given) == picture.size
        picture.load()


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("param", ["image", "mask", "last_image", "control_image"])
def test_hostile_pictures_are_refused_fast_and_by_name(name: str, param: MediaRole) -> None:
    began = time.process_time()
    hostile: list[tuple[MediaRole, bytes]] = [(param, HOSTILE[name])]
    files = hostile if param == "image" else [("image", file(colored())), *hostile]
    with pytest.raises(InvalidParameter) as refused:
        decode(files)
    assert refused.value.param == param
    assert refused.value.code == ("picture_too_large" if name in TOO_LARGE else "invalid_picture"), refused.value
    assert time.process_time() - began < 1.0


def test_a_bomb_is_refused_by_its_header_alone() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidParameter, match=f"65535x65535 pixels, at most {MAX_PIXELS}|far too many"):
            decode([("image", HOSTILE["a bomb of 4 gigapixels"])])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def check_damaged(count: int, seed: int) -> tuple[int, int]:
    """How many were taken and refused. Anything else than these is an error of this server."""
    taken = 0
    for name, data in damaged(count, seed):
        try:
            decode([("image", data)])
            taken += 1
        except InvalidParameter as refused:
            assert refused.code in ("invalid_picture", "picture_too_large"), name
    return taken, count - taken


def test_damaged_pictures_are_the_callers_mistake() -> None:
    taken, refused = check_damaged(400, seed=1)
    assert min(taken, refused) > 40


@pytest.mark.soak
def test_two_thousand_damaged_pictures_leave_no_memory_behind() -> None:
    check_damaged(500, seed=2)
    before = psutil.Process().memory_info().rss
    check_damaged(1500, seed=3)
    assert psutil.Process().memory_info().rss < 1.05 * before


def test_what_is_transparent_lets_white_through() -> None:
    picture = colored(mode="RGBA")
    picture.putalpha(0)
    (image,) = decode([("image", file(picture))])
    assert opened(image).getextrema() == ((255, 255),) * 3


MASKS: dict[str, tuple[Image.Image, int]] = {
    "white": (gray(255), 255),
    "black": (gray(0), 0),
    "16 bits": (gray(128).convert("I").point(lambda level: level * 257).convert("I;16"), 128),
    "transparent": (Image.merge("LA", (gray(0), gray(0))), 255),
    "opaque, white": (Image.merge("LA", (gray(255), gray(255))), 255),
    "half transparent": (Image.merge("LA", (gray(255), gray(100))), 155),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_white_where_it_says_so(name: str) -> None:
    picture, level = MASKS[name]
    _, mask = decode([("image", file(gray(9))), ("mask", file(picture))])
    assert opened(mask).getextrema() == (level, level)


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    (image,) = decode([("image", UNUSUAL["16 bit gray"])])
    assert opened(image).convert("L").tobytes() == colored(mode="L").tobytes()


def test_the_orientation_of_a_photo_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    (image,) = decode([("image", file(colored(24, 16), "JPEG", exif=exif, quality=95))])
    assert size_of(image) == (16, 24)


def test_the_first_frame_counts() -> None:
    (image,) = decode([("image", UNUSUAL["animated PNG"])])
    assert opened(image).tobytes() == colored().tobytes()


def test_a_mask_has_the_size_of_its_image() -> None:
    with pytest.raises(InvalidParameter, match="the mask has 8x9 pixels, the image 8x8") as refused:
        decode([("image", file(gray(1))), ("mask", file(gray(1, (8, 9))))])
    assert refused.value.param == "mask"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://example.com/a.png", "no URL is fetched"),
        ("file:///etc/passwd", "no URL is fetched"),
        ("http://169.254.169.254/latest", "no URL is fetched"),
        ("data:image/png,abc", "in base64"),
        ("data:image/png;base64", "in base64"),
        ("data:image/png;base64,a*b", "no base64"),
        ("data:image/png;base64,\N{SNOWMAN}", "no base64"),
        ("", "no URL is fetched"),
    ],
)
def test_only_data_urls_are_read(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_data_url(url)
    assert from_data_url("DATA:image/png;BASE64,YWI=") == b"ab"


def test_few_pictures_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a caller who leaves makes no room before the thread has."""
    monkeypatch.setattr(pictures, "MOST_WAITING", 2)
    going = random.Random(1)
    big = file(Image.frombytes("RGB", (400, 400), going.randbytes(3 * 400 * 400)), compress_level=0)

    async def run() -> Any:
        first, second = (asyncio.ensure_future(read_pictures([("image", big)])) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(QueueFull, match="2 requests wait for their pictures"):
            await read_pictures([("image", big)])
        await second
        with pytest.raises(InvalidParameter):
            await read_pictures([("image", b"")])
        while pictures._waiting.total():
            await asyncio.sleep(0.01)
        return await read_pictures([("image", big)])

    (image,) = asyncio.run(run())
    assert size_of(image) == (400, 400)


def test_no_key_takes_all_places_and_callers_who_leave_free_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    going_on, decoded = threading.Event(), []

    def slow(*given: object) -> tuple[MediaInput, ...]:
        decoded.append(given)
        assert going_on.wait(60)
        return ()

    monkeypatch.setattr(pictures, "decode", slow)

    async def waiting(count: int) -> None:
        while pictures._waiting.total() != count:
            await asyncio.sleep(0.01)

    async def run() -> None:
        token = key_name.set("many")
        many = [asyncio.ensure_future(read_pictures([])) for _ in range(pictures.MOST_OF_ONE)]
        await waiting(pictures.MOST_OF_ONE)
        with pytest.raises(QueueFull, match="8 of your requests"):
            await read_pictures([])
        key_name.reset(token)
        other = asyncio.ensure_future(read_pictures([]))
        await waiting(pictures.MOST_OF_ONE + 1)
        for each in many:
            each.cancel()
        await waiting(pictures.THREADS + 1)  # what a thread has begun goes on
        going_on.set()
        assert await other == ()
        await waiting(0)

    asyncio.run(run())
    assert len(decoded) == pictures.THREADS + 1
