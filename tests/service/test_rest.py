"""REST alone, without Ray: what is accepted, what is refused and how, nothing internal leaks."""

import asyncio
import io
import json
import zipfile
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

from deploy.gateway_spec import GatewaySpec
from service.api.bodies import MAX_SEED, ImageGenerationBody, LoRAChoice, StreamOptions, VideoGenerationBody
from service.api.errors import envelope
from service.api.generation import Delivery
from service.api.origin import new_id
from service.api.rest import rest_app
from service.api.schemas import to_request
from service.api.streaming import EventStream
from tests.support.backend import FakeBackend


def post(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/images/generations", json={"model": "one", "prompt": "a"} | body)


REFUSED = [
    ({"prompt": 3}, "prompt", "invalid_value"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": ["a"]}, "prompt", "invalid_value"),
    ({"prompt": "   "}, "prompt", "invalid_value"),
    ({"prompt": "\t\n\u00a0\u3000\u200b\ufeff"}, "prompt", "invalid_value"),
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": "a" * 32_001}, "prompt", "invalid_value"),
    ({"num_infrence_steps": 3}, "num_infrence_steps", "unknown_parameter"),
    ({"num_inference_steps": 0}, "num_inference_steps", "invalid_value"),
    ({"num_inference_steps": 101}, "num_inference_steps", "invalid_value"),
    ({"num_inference_steps": "4"}, "num_inference_steps", "invalid_value"),
    ({"size": "63x64"}, "size", "invalid_size"),
    ({"size": "0x64"}, "size", "invalid_size"),
    ({"size": "4096x64"}, "size", "invalid_size"),
    ({"size": "64"}, "size", "invalid_size"),
    ({"size": "٦٤x64"}, "size", "invalid_size"),
    ({"size": 64}, "size", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 5}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_value"),
    ({"seed": -1}, "seed", "invalid_value"),
    ({"seed": MAX_SEED + 1}, "seed", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_value"),
    ({"seed": MAX_SEED, "n": 2}, "seed", "invalid_value"),
    ({"seed": MAX_SEED - 2, "n": 4}, "seed", "invalid_value"),
    ({"guidance_scale": "x"}, "guidance_scale", "invalid_value"),
    ({"guidance_scale": 31}, "guidance_scale", "invalid_value"),
    ({"negative_prompt": 3}, "negative_prompt", "invalid_value"),
    ({"response_format": "uri"}, "response_format", "invalid_value"),
    ({"response_format": "file", "stream": True}, "response_format", "invalid_value"),
    ({"output_format": "gif"}, "output_format", "invalid_value"),
    ({"background": "transparent"}, "background", "invalid_value"),
    ({"partial_images": 2}, "partial_images", "invalid_value"),
    ({"stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({"stream_options": {"include_progress": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"preview_decoder": "vae"}}, "stream_options.preview_decoder", "invalid_value"),
    ({"extra_params": {"a": [[1]]}}, "extra_params.a", "invalid_value"),
    ({"extra_params": {"b": 1, "a": {"c": 1}}}, "extra_params.a", "invalid_value"),
    ({"extra_params": {"a": None}}, "extra_params.a", "invalid_value"),
    ({"extra_params": {"a": 2**53 + 1}}, "extra_params.a", "invalid_value"),
    ({"model": None}, "model", "missing_required_parameter"),
    ({"modle": None}, "modle", "unknown_parameter"),
    ({"loras": [{"name": None}]}, "loras.0.name", "missing_required_parameter"),
]


@pytest.mark.parametrize(("body", "param", "code"), REFUSED, ids=[str(row[0])[:40] for row in REFUSED])
def test_refused(client: TestClient, backend: FakeBackend, body: dict[str, Any], param: str, code: str) -> None:
    answer = post(client, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert param.split(".")[0] in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert backend.requests == []


def test_the_largest_seed_may_be_the_last_pictures(client: TestClient) -> None:
    answer = post(client, seed=MAX_SEED - 3, n=4)
    assert [picture["seed"] for picture in answer.json()["data"]] == [MAX_SEED - 3 + i for i in range(4)]


NULLABLE = [
    (kind, name)
    for kind in (ImageGenerationBody, VideoGenerationBody, StreamOptions, LoRAChoice)
    for name, field in kind.model_fields.items()
    if not field.is_required()
]


@pytest.mark.parametrize(("kind", "name"), NULLABLE, ids=lambda value: value if isinstance(value, str) else "")
def test_null_is_as_absent(kind: type[BaseModel], name: str) -> None:
    """OpenAI's clients send null for None."""
    required = {name: "a" for name, field in kind.model_fields.items() if field.is_required()}
    body = kind.model_validate(required | {name: None})
    assert body == kind.model_validate(required)
    assert body.model_fields_set == required.keys()


def test_a_request_of_nulls_draws_the_defaults(client: TestClient, backend: FakeBackend) -> None:
    nulls = {name: None for kind, name in NULLABLE if kind is ImageGenerationBody and name != "model"}
    answer = post(client, **nulls | {"seed": 1})
    assert answer.status_code == 200
    assert "x-ignored-params" not in answer.headers
    assert post(client, seed=1, stream_options={"include_progress": None}).status_code == 200
    first, second = (replace(request, request_id="") for request in backend.requests)
    assert first == second


def test_a_misspelled_field_is_named_before_the_one_it_leaves_missing(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", json={"promt": "a"})
    assert answer.json()["error"]["message"] == "unknown parameter 'promt'; did you mean 'prompt'?"


def test_many_unknown_fields_are_refused_at_once(client: TestClient) -> None:
    for extra in ({str(i): 1 for i in range(90_000)}, {"stream_options": {str(i): 1 for i in range(90_000)}}):
        answer = post(client, **extra)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_body")


@pytest.mark.parametrize(
    ("headers", "local", "status"),
    [
        ({"content-type": "text/plain"}, False, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, False, 415),
        ({"content-type": "application/json; charset=utf-8"}, False, 200),
        ({"origin": "http://evil.example"}, False, 403),
        ({"origin": "null"}, False, 403),
        ({"origin": "http://evil.example", "authorization": "Bearer none"}, False, 200),
        ({"origin": "http://here:8000", "host": "here:8000"}, False, 200),
        ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, True, 403),
        ({"host": "evil.example"}, True, 403),
        ({"host": "evil.example", "authorization": "Bearer none"}, True, 403),
        ({"host": "["}, True, 403),
        ({"origin": "http://["}, False, 403),
        ({"host": "evil.example"}, False, 200),
        ({"host": "localhost:8000"}, True, 200),
        ({"host": "127.0.0.1:8000"}, True, 200),
        ({"host": "[::1]:8000"}, True, 200),
    ],
)
def test_a_web_page_cannot_drive_a_server_without_keys(
    backend: FakeBackend, client: TestClient, headers: dict[str, str], local: bool, status: int
) -> None:
    backend.local_only = local
    body = json.dumps({"model": "one", "prompt": "a"})
    answer = client.post("/v1/images/generations", content=body, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status, answer.text
    assert len(backend.requests) == (status == 200)
    assert status == 200 or answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(("given", "kept"), [("a-1.b", True), ("a" * 65, False), ("a b", False), ("", False)])
def test_a_request_keeps_the_id_that_proxies_log(
    backend: FakeBackend, client: TestClient, given: str, kept: bool
) -> None:
    for _ in range(2):
        client.post("/v1/images/generations", json={"model": "one", "prompt": "a"}, headers={"x-request-id": given})
    ids = [request.request_id for request in backend.requests]
    assert len(set(ids)) == 2  # whoever sends one twice still has two requests
    assert all(found.startswith(f"{given}-") for found in ids) == kept


@pytest.mark.parametrize("letter", ["é", "文", "٣", "\n"])
def test_an_id_is_of_the_letters_that_every_log_takes(letter: str) -> None:
    assert new_id("a").startswith("a-")
    assert letter not in new_id(f"a{letter}")


def test_unknown_model(client: TestClient) -> None:
    answer = post(client, model="three")
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"
    assert answer.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/three").status_code == 404


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"a"', b'{"prompt": NaN}', b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_request(client: TestClient, content: bytes) -> None:
    answer = client.post("/v1/images/generations", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("value", [b"NaN", b"-Infinity", b"1e400", b"1" * 400, rb'"\ud800"'])
def test_what_not_every_form_can_tell_is_refused(client: TestClient, value: bytes) -> None:
    """A job with it could not be kept, or listed."""
    body = b'{"model": "one", "prompt": "a", "extra_params": {"tea": %s}}' % value
    answer = client.post("/v1/images/generations", content=body, headers={"prefer": "respond-async"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "extra_params.tea")


def test_an_error_may_quote_what_is_not_unicode(client: TestClient) -> None:
    body = rb'{"model": "one", "prompt": "a", "size": "\ud800", "width": 64, "height": 64}'
    answer = client.post("/v1/images/generations", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_size")
    assert envelope("\ud800", "", None, None)["error"]["message"] == r"\ud800"


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/videos/sync"])
def test_a_body_may_be_as_large_as_the_deployment_allows(client: TestClient, backend: FakeBackend, path: str) -> None:
    body = b'{"model": "%s", "prompt": "a"' % (b"film" if "videos" in path else b"one")
    backend.max_body_bytes = 2048
    assert client.post(path, content=body.ljust(2047) + b"}").status_code == 200
    answer = client.post(path, content=body.ljust(2048) + b"}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert "larger than 2048 bytes" in answer.json()["error"]["message"]
    backend.max_body_bytes = 2049
    assert client.post(path, content=body.ljust(2048) + b"}").status_code == 200


@pytest.mark.parametrize(
    ("prompt", "status", "code", "retry"),
    [
        ("full", 429, "queue_full", True),
        ("lost", 503, "worker_lost", False),
        ("draining", 503, "shutting_down", True),
        ("failed", 500, "generation_failed", False),
        ("peer", 500, "generation_failed", False),
        ("bug", 500, "internal_error", False),
    ],
)
def test_failures(backend: FakeBackend, prompt: str, status: int, code: str, retry: bool) -> None:
    client = TestClient(rest_app(backend), raise_server_exceptions=prompt != "bug")
    answer = post(client, prompt=prompt)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in answer.headers) == retry
    assert (answer.headers.get("x-should-retry") == "false") == (not retry)
    assert "secret" not in answer.text
    streamed = post(client, prompt=prompt, stream=True)  # its status waits until the request is admitted
    assert (streamed.status_code, streamed.json()) == (status, answer.json())
    assert ("retry-after" in streamed.headers) == retry
    assert (streamed.headers.get("x-should-retry") == "false") == (not retry)


def test_a_stream_that_fails_later_ends_with_the_error(client: TestClient) -> None:
    answer = post(client, prompt="later", stream=True)
    first, last = answer.text.split("\n\n", 1)
    assert (answer.status_code, first) == (200, ": step 1/1")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "worker_lost"


def test_a_client_that_leaves_before_the_first_event_frees_its_gang(backend: FakeBackend) -> None:
    async def story() -> None:
        request = to_request(ImageGenerationBody(prompt="endless", model="one"), backend.models()["one"], "a")
        deliver = Delivery("b64_json", backend.outputs, "", "")
        stream = await EventStream.open(backend.generate(request), request, False, {}, deliver)

        async def gone(_: Any) -> None:
            raise OSError("the client left")

        with pytest.raises(OSError, match="the client left"):
            await stream.stream_response(gone)
        assert backend.closed

    asyncio.run(story())


def test_defaults_are_settled_at_admission(client: TestClient, backend: FakeBackend) -> None:
    assert post(client).status_code == 200
    (request,) = backend.requests
    assert (request.width, request.height, request.num_inference_steps) == (1024, 1024, 50)
    assert request.negative_prompt is None
    assert 0 <= request.seed <= MAX_SEED


def test_paths_and_methods_that_do_not_exist(client: TestClient) -> None:
    for answer, status in ((client.get("/v2"), 404), (client.get("/v1/images/generations"), 405)):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_zip_is_the_same_at_any_time(client: TestClient) -> None:
    answer = post(client, n=2, seed=7, response_format="file")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert [entry.filename for entry in archive.infolist()] == ["0-7.png", "1-8.png"]
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # the least that a zip has
        assert archive.read("1-8.png") == b"picture 8"


def test_urls_begin_where_callers_reach_the_gateway(client: TestClient, backend: FakeBackend) -> None:
    for public, begin in (
        (None, "http://testserver/v1/outputs/"),
        ("https://a.example", "https://a.example/v1/outputs/"),
    ):
        backend.public_url = public
        assert post(client, response_format="url").json()["data"][0]["url"].startswith(begin)
        assert f'"url":"{begin}' in post(client, response_format="url", stream=True).text.replace('": "', '":"')


@pytest.mark.parametrize("url", ["a.example", "https://A.example", "https://a.example/", "https://a.example/spray"])
def test_a_public_url_is_an_origin(url: str) -> None:
    assert GatewaySpec(public_url="https://a.example:8443").public_url
    with pytest.raises(ValueError, match="and no path; such as https://"):
        GatewaySpec(public_url=url)


def test_stream_without_options_has_progress_as_comments(client: TestClient) -> None:
    lines = post(client, stream=True).text.splitlines()
    assert lines[0] == ": step 1/1"
    assert "event: image_generation.completed" in lines
    assert lines[-2] == "data: [DONE]"


def test_adapters_are_chosen_by_name(backend: FakeBackend, client: TestClient) -> None:
    body = {"model": "one", "prompt": "a", "loras": [{"name": "ink", "scale": 0.5}]}
    assert client.post("/v1/images/generations", json=body).status_code == 200
    assert backend.requests[0].loras == (("ink", 0.5),)
    assert client.get("/v1/models/one").json()["loras"] == ["ink"]
    for loras, said in (
        ([{"name": "pencil"}], "'one' has no adapter 'pencil'; available: ink"),
        ([{"name": "ink"}, {"name": "ink"}], "the adapter 'ink' is named twice"),
    ):
        answer = client.post("/v1/images/generations", json=body | {"loras": loras})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "loras"
        assert said in answer.json()["error"]["message"]
