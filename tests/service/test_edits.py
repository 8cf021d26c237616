"""`POST /v1/images/edits`: pictures that begin with one, in forms and in JSON, and by OpenAI's client."""

import base64
import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.api.bodies import ImageEditBody
from service.api.reading import MAX_TEXT_BYTES
from service.api.rest import rest_app
from service.state.quarantine import fingerprint
from tests.support.backend import FakeBackend
from tests.support.hostile import HOSTILE, UNUSUAL, colored, damaged, file
from tests.support.in_process import served
from workers.messages import GenerationRequest, MediaInput

EDITS = "/v1/images/edits"

PICTURE, MASK = file(colored(120, 80)), file(colored(120, 80, "L"))


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def as_form(client: TestClient, image: Any, mask: Any = None, **fields: Any) -> Any:
    files = [
        ("image[]" if isinstance(image, list) else "image", ("a.png", image[0] if isinstance(image, list) else image))
    ]
    files += [("mask", ("m.png", mask))] if mask is not None else []
    return client.post(EDITS, data={"prompt": "a", "model": "one"} | fields, files=files)


def as_json(client: TestClient, image: Any, mask: Any = None, **fields: Any) -> Any:
    given = [{"image_url": url(image[0])}] if isinstance(image, list) else url(image)
    body = {"prompt": "a", "model": "one", "images" if isinstance(image, list) else "image": given} | fields
    return client.post(EDITS, json=body | ({"mask": {"image_url": url(mask)}} if mask is not None else {}))


@pytest.mark.parametrize("send", [as_form, as_json])
@pytest.mark.parametrize("image", [PICTURE, [PICTURE]], ids=["one", "a list"])
def test_a_picture_and_a_mask_reach_the_backend(
    client: TestClient, backend: FakeBackend, send: Any, image: Any
) -> None:
    answer = send(client, image, MASK, strength=0.5, size="64x96", input_fidelity="high", seed=7)
    assert answer.status_code == 200, answer.text
    assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == b"picture 7"
    assert answer.headers["x-ignored-params"] == "input_fidelity"
    (request,) = backend.requests
    assert [each.role for each in request.inputs] == ["image", "mask"]
    assert (request.strength, request.width, request.height) == (0.5, 64, 96)
    for each, given in zip(request.inputs, (PICTURE, MASK), strict=True):
        assert Image.open(io.BytesIO(each.data)).tobytes() == Image.open(io.BytesIO(given)).tobytes()


SIZES = [
    ((120, 80), (128, 80)),  # no larger than it is, to the nearest multiple of 16
    ((4000, 3000), (1184, 880)),  # as many pixels as the default, 1024 x 1024
    ((5000, 100), (2048, 48)),  # at most as long as the model allows
    ((1, 1), (16, 16)),
]


@pytest.mark.parametrize(("given", "made"), SIZES, ids=str)
def test_the_size_is_that_of_the_image(
    client: TestClient, backend: FakeBackend, given: tuple[int, int], made: tuple[int, int]
) -> None:
    assert as_form(client, file(colored(*given))).status_code == 200
    assert (backend.requests[0].width, backend.requests[0].height) == made


def test_a_stream_has_the_events_of_edits(client: TestClient) -> None:
    fields = {"stream": "true", "partial_images": "1", "stream_options": '{"include_progress": true}'}
    lines = as_form(client, PICTURE, **fields).text.splitlines()
    found = [json.loads(line[6:])["type"] for line in lines if line.startswith("data: {")]
    assert found == ["image_edit.progress", "image_edit.partial_image", "image_edit.completed"]


def two(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a", "model": "one", "image": url(PICTURE)} | changes


REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no image": (two(image=None), "image", "missing_required_parameter", "required"),
    "a mask alone": (two(image=None, mask=url(MASK)), "image", "missing_required_parameter", "required"),
    "many images": (two(image=[url(PICTURE)] * 11), "image", "invalid_value", "at most 10 items"),
    "none in a list": (two(image=[]), "image", "invalid_value", "at least 1 item"),
    "two names": (two(images=url(MASK)), "images", "invalid_value", "another name of image"),
    "a URL": (two(image="https://example.com/a.png"), "image.0", "invalid_value", "no URL is fetched"),
    "a URL in an object": (two(mask={"image_url": "http://10.0.0.1/"}), "mask", "invalid_value", "no URL is fetched"),
    "a file of OpenAI's": (two(image={"file_id": "file-1"}), "image.0", "invalid_value", "no files are kept here"),
    "a number": (two(image=7), "image.0", "invalid_value", "valid bytes"),
    "no picture": (two(image=url(b"abc")), "image", "invalid_picture", "must be a PNG, JPEG or WebP"),
    "sizes that differ": (two(mask=url(file(colored()))), "mask", "invalid_picture", "24x16 pixels, the image 120x80"),
    "no strength": (two(strength=0), "strength", "invalid_value", "greater than or equal to 0.01"),
    "too much": (two(strength=1.1), "strength", "invalid_value", "less than or equal to 1"),
    "another task": (
        two(model="paint"), "model", "wrong_task",
        r"'paint' is not for image-to-image; it is for text-to-image (ask at /v1/images/generations)",
    ),
    "a video model": (two(model="film", mask=url(MASK)), "model", "wrong_task", "not for inpaint; it is for text-to-v"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(client: TestClient, backend: FakeBackend, name: str) -> None:
    body, param, code, said = REFUSED[name]
    answer = client.post(EDITS, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
    assert said in error["message"]
    assert backend.requests == []


@pytest.mark.parametrize("send", [as_form, as_json])
def test_no_picture_is_the_servers_mistake(client: TestClient, backend: FakeBackend, send: Any) -> None:
    backend.max_body_bytes = 1 << 22
    files = [*HOSTILE.items(), *UNUSUAL.items(), *damaged(60, seed=5)]
    statuses = {name: send(client, data).status_code for name, data in files}
    assert set(statuses.values()) == {200, 400}, statuses
    assert all(statuses[name] == 400 for name in HOSTILE) and all(statuses[name] == 200 for name in UNUSUAL)


def test_only_bodies_with_pictures_may_be_long(client: TestClient, backend: FakeBackend) -> None:
    backend.max_body_bytes = 2 * MAX_TEXT_BYTES
    long = {"prompt": "a", "model": "one", "user": "a" * MAX_TEXT_BYTES}
    assert client.post("/v1/images/generations", json=long).status_code == 413
    assert client.post(EDITS, json=long | {"image": url(PICTURE)}).status_code == 200
    backend.max_body_bytes = 1024
    assert as_form(client, PICTURE + bytes(1024)).status_code == 413


def test_pictures_elsewhere_say_where_they_go(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "a", "model": "one", "image": url(PICTURE)})
    assert "taken as `image` and `mask` at /v1/images/edits" in answer.json()["error"]["message"]
    answer = client.post(EDITS, data={"prompt": "a"}, files={"prompt2": ("a", b"a")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt2")


REQUEST = GenerationRequest("a", "one", "a", 64, 64, 4, seed=1, inputs=(MediaInput("image", b"one"),), strength=0.5)


def test_the_picture_is_part_of_what_is_asked(client: TestClient, backend: FakeBackend) -> None:
    """A key that comes again with another picture is another request."""
    plain = replace(REQUEST, inputs=(), strength=None)
    others = [plain, replace(plain, strength=0.5), replace(REQUEST, inputs=(MediaInput("image", b"two"),)),
              replace(REQUEST, inputs=(MediaInput("mask", b"one"),)), REQUEST]  # fmt: skip
    assert len({fingerprint("", each) for each in others}) == 5
    assert fingerprint("", plain).startswith("936be0aa743e3866")  # as before pictures were known
    headers = {"idempotency-key": "one"}
    for data, status in ((PICTURE, 200), (PICTURE, 200), (MASK, 422)):
        body = {"prompt": "a", "model": "one", "image": url(data)}
        assert client.post(EDITS, json=body, headers=headers).status_code == status
    assert len(backend.requests) == 1


def test_an_edit_may_be_a_job(client: TestClient, backend: FakeBackend) -> None:
    body = {"prompt": "a", "model": "one", "image": url(PICTURE), "mask": url(MASK), "strength": 0.5, "seed": 7}
    with client:
        answer = client.post(EDITS, json=body, headers={"prefer": "respond-async"})
        assert answer.status_code == 202, answer.text
        place = answer.headers["location"]
        until = time.monotonic() + 30
        while client.get(place).json()["state"] != "succeeded" and time.monotonic() < until:
            time.sleep(0.01)
        assert client.get(f"{place}/content").content == b"picture 7"
    (request,) = backend.requests
    assert [each.role for each in request.inputs] == ["image", "mask"]
    assert (request.strength, request.inputs[0].data[:4]) == (0.5, b"\x89PNG")


def test_several_pictures_and_one_to_follow(client: TestClient, backend: FakeBackend) -> None:
    files = [("image[]", ("a.png", PICTURE)), ("image[]", ("b.png", MASK)), ("control_image", ("c.png", PICTURE))]
    assert client.post(EDITS, data={"prompt": "a", "model": "one"}, files=files).status_code == 200
    body = {
        "prompt": "a",
        "model": "one",
        "images": [url(PICTURE), {"image_url": url(MASK)}],
        "control_image": url(PICTURE),
    }
    assert client.post(EDITS, json=body).status_code == 200
    form, json_ = backend.requests
    assert form.inputs == json_.inputs
    assert [each.role for each in form.inputs] == ["image", "image", "control_image"]
    alone = {"prompt": "a", "model": "one", "control_image": url(PICTURE)}
    assert client.post(EDITS, json=alone).status_code == 200
    assert (backend.requests[-1].width, backend.requests[-1].height) == (128, 80)
    assert client.post(EDITS, json=alone | {"mask": url(MASK)}).status_code == 200  # of the picture that controls
    assert [each.role for each in backend.requests[-1].inputs] == ["control_image", "mask"]


def test_all_pictures_of_a_request_have_a_limit(monkeypatch: pytest.MonkeyPatch, client: TestClient) -> None:
    monkeypatch.setattr("service.api.pictures.MOST_PIXELS", 2 * 120 * 80)
    body = {"prompt": "a", "model": "one", "image": [url(PICTURE)] * 2}
    assert client.post(EDITS, json=body).status_code == 200
    answer = client.post(EDITS, json=body | {"control_image": url(PICTURE)})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "control_image", "picture_too_large"), error


def test_the_bytes_of_pictures_are_in_no_log() -> None:
    assert "one" not in repr(REQUEST.inputs) and "data" not in repr(REQUEST.inputs)


@pytest.fixture(scope="module")
def openais() -> Iterator[tuple[openai.OpenAI, FakeBackend]]:
    backend = FakeBackend()
    with served(rest_app(backend)) as server:
        yield openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0), backend


def test_openais_client_edits(openais: tuple[openai.OpenAI, FakeBackend]) -> None:
    client, backend = openais
    extra = {"seed": 7, "strength": 0.4}
    for image, mask in (
        (PICTURE, None),
        ([PICTURE], MASK),
        ([PICTURE, MASK], None),
        (("cup.png", PICTURE, "image/png"), MASK),
    ):
        given = {"mask": mask} if mask else {}
        drawn = client.images.edit(model="one", image=image, prompt="a", n=2, size="64x64", extra_body=extra, **given)
        assert [base64.b64decode(each.b64_json or "") for each in drawn.data or []] == [b"picture 7", b"picture 8"]
        count = len(image) if isinstance(image, list) else 1
        roles = ["image"] * count + (["mask"] if mask else [])
        assert [each.role for each in backend.requests[-1].inputs] == roles
        assert (backend.requests[-1].strength, backend.requests[-1].n) == (0.4, 2)
    stream = client.images.edit(model="one", image=PICTURE, prompt="a", stream=True, partial_images=1)
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]
    with pytest.raises(openai.BadRequestError, match="must be a PNG, JPEG or WebP") as refused:
        client.images.edit(model="one", image=b"abc", prompt="a")
    assert (refused.value.param, refused.value.code) == ("image", "invalid_picture")


def test_fields_that_may_be_files_are_fields() -> None:
    assert ImageEditBody.model_fields.keys() >= ImageEditBody.PICTURES
