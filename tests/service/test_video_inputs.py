"""Videos that begin with pictures: `/v1/videos` and `/v1/videos/sync`, in forms and in JSON, and by OpenAI's client."""

import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from service.api.bodies import VideoGenerationBody
from service.api.rest import rest_app
from tests.support.backend import FakeBackend
from tests.support.hostile import HOSTILE, UNUSUAL, colored, file
from tests.support.in_process import served

FIRST, LAST = file(colored(120, 80)), file(colored(60, 40))
BODY = {"model": "one", "prompt": "a cup", "seed": 7, "num_frames": 5}


@pytest.fixture
def url(backend: FakeBackend) -> Iterator[str]:
    with served(rest_app(backend)) as url:
        yield f"{url}/v1/videos"


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize("path", ["", "/sync"])
@pytest.mark.parametrize("name", ["input_reference", "image"])
def test_the_first_and_the_last_picture_reach_the_backend(url: str, backend: FakeBackend, path: str, name: str) -> None:
    fields = {key: str(value) for key, value in BODY.items()}
    form = httpx.post(url + path, data=fields, files={name: ("a.png", FIRST), "last_image": ("b.png", LAST)})
    told = httpx.post(url + path, json=BODY | {name: {"image_url": data_url(FIRST)}, "last_image": data_url(LAST)})
    assert (form.status_code, told.status_code) == (200, 200), (form.text, told.text)
    until = time.monotonic() + 30
    while len(backend.requests) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    for request in backend.requests:
        assert [each.role for each in request.inputs] == ["image", "last_image"]
        assert (request.width, request.height, request.output_format) == (128, 80, "mp4")
        for each, given in zip(request.inputs, (FIRST, LAST), strict=True):
            assert Image.open(io.BytesIO(each.data)).tobytes() == Image.open(io.BytesIO(given)).tobytes()


def test_openais_client_sends_a_picture(url: str, backend: FakeBackend, tmp_path: Path) -> None:
    (tmp_path / "cup.png").write_bytes(FIRST)
    client = openai.OpenAI(base_url=url.removesuffix("/videos"), api_key="none")
    references: list[Any] = [tmp_path / "cup.png", ("cup.png", FIRST, "image/png"), FIRST]
    for reference in references:
        made = client.videos.create_and_poll(
            prompt="a cup", model="one", input_reference=reference, size="64x64", extra_body={"seed": 7}
        )
        assert (made.status, made.size) == ("completed", "64x64")
        assert [each.role for each in backend.requests[-1].inputs] == ["image"]
    assert len(backend.requests) == len(references)
    with pytest.raises(openai.BadRequestError, match="must be a PNG, JPEG or WebP") as refused:
        client.videos.create(prompt="a cup", model="one", input_reference=b"abc")
    assert (refused.value.param, refused.value.code) == ("input_reference", "invalid_picture")


REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "a last picture alone": ({"last_image": data_url(LAST)}, "input_reference", "missing_required_parameter", "requi"),
    "two names": (
        {"image": data_url(FIRST), "input_reference": data_url(LAST)},
        "image",
        "invalid_value",
        "another name of input_reference",
    ),
    "a URL": ({"image": "https://example.com/a.png"}, "image", "invalid_value", "no URL is fetched"),
    "a file of OpenAI's": ({"image": {"file_id": "file-1"}}, "image", "invalid_value", "no files are kept here"),
    "strength of noise": ({"strength": 0.5}, "strength", "invalid_value", "begins with a picture or a clip"),
    "a mask": ({"mask": data_url(FIRST)}, "mask", "unknown_parameter", "not supported here"),
    "another task": (
        {"model": "film", "image": data_url(FIRST)},
        "model",
        "wrong_task",
        "'film' is not for image-to-video; it is for text-to-video (ask at /v1/videos/sync)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(url: str, backend: FakeBackend, name: str) -> None:
    wrong, param, code, said = REFUSED[name]
    for path in ("", "/sync"):
        answer = httpx.post(url + path, json=BODY | wrong)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
        assert said in error["message"]
    assert backend.requests == []


def test_no_picture_is_the_servers_mistake(url: str) -> None:
    for name, data in [*HOSTILE.items(), *UNUSUAL.items()]:
        answer = httpx.post(f"{url}/sync", json=BODY | {"image": data_url(data)})
        assert answer.status_code == (400 if name in HOSTILE else 200), name


def test_the_picture_is_part_of_what_is_asked(url: str) -> None:
    key = {"idempotency-key": "one"}
    sent = [httpx.post(url, json=BODY | {"image": data_url(each)}, headers=key) for each in (FIRST, FIRST, LAST)]
    assert [each.status_code for each in sent] == [200, 200, 422]
    assert sent[0].json()["id"] == sent[1].json()["id"]


def test_a_remix_begins_with_the_same_picture(url: str, backend: FakeBackend) -> None:
    video = httpx.post(url, json=BODY | {"image": data_url(FIRST)}).json()
    assert httpx.post(f"{url}/{video['id']}/remix", json={"prompt": "a fox"}).status_code == 200
    until = time.monotonic() + 30
    while len(backend.requests) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    one, other = backend.requests
    assert (one.inputs, one.prompt, other.prompt) == (other.inputs, "a cup", "a fox")


def test_fields_that_may_be_files_are_fields() -> None:
    assert VideoGenerationBody.model_fields.keys() >= VideoGenerationBody.PICTURES
