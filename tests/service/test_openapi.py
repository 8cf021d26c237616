"""The description of the API is true: schemathesis makes requests from it, right and wrong, and judges the answers.

`SPRAY_API_EXAMPLES` sets how many it makes for each route, beside those for each bound of each field.
"""

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup

from service.api.answers import Alive, ErrorResponse, GenerationResponse, ModelList, Ready
from service.api.bodies import PICTURE_INPUTS, ImageGenerationBody, VideoGenerationBody
from service.api.errors import STATUS
from service.api.openapi import ERRORS
from service.api.rest import CODES, rest_app
from tests.support.backend import FakeBackend

EXAMPLES = int(os.environ.get("SPRAY_API_EXAMPLES", "8"))

bounded = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


def described(app: FastAPI, accepted: list[int], **more: Any) -> Any:
    """The API by its description. A request that is right by that must be answered with one of these statuses."""
    config = {"checks": {"positive_data_acceptance": {"expected-statuses": accepted}}, **more}
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=SchemathesisConfig.from_dict(config))


ANY = described(rest_app(FakeBackend()), [200, 202, 400, 403, 404, 422])
"""What no schema says may still be wrong: limits of the model, names that nothing has, fields that contradict, an
idempotency key of another request."""


@ANY.parametrize()
@bounded
def test_every_answer_is_as_described(case: Any) -> None:
    case.call_and_validate()


RIGHT = described(
    rest_app(FakeBackend()), [200], generation={"mode": "positive"}, phases={"coverage": {"enabled": False}}
)


@RIGHT.hook
def map_body(context: Any, body: Any) -> Any:
    """What the schema alone allows -> a request that the backend's models take."""
    if not isinstance(body, dict) or not isinstance(body.get("prompt"), str):
        return body
    body = {name: value for name, value in body.items() if value is not None}  # forms have no null
    is_video = "videos" in context.operation.path
    for name in (
        "extra_body",
        "extra_params",
        "flow_shift",
        "lora",
        "num_outputs_per_prompt",
        "seeds",
        "strength",  # of what begins with a picture
        "true_cfg_scale",
        *PICTURE_INPUTS,  # whether text is a picture, no schema says
    ):
        body.pop(name, None)
    for name, most in (("num_inference_steps", 10), ("num_frames", 9), ("n", 1 if is_video else 4), ("seed", 2**40)):
        if body.get(name) is not None:
            body[name] = body[name] % most + 1
    if not is_video:
        body.pop("guidance_scale_2", None)
    if body.get("loras"):
        body["loras"] = [body["loras"][0] | {"name": "ink"}]
    if "images" in context.operation.path:  # for jobs alone
        body.pop("priority", None)
        body.pop("deadline_s", None)
        body.pop("webhook_url", None)
    if not body.get("stream"):
        body.pop("partial_images", None)
    if body.get("stream") and body.get("response_format") == "file":
        body["response_format"] = "url"
    for name in ("width", "height", "seconds"):
        body.pop(name, None)
    return body | {"prompt": "a" + body["prompt"][:99], "model": "film" if is_video else "one", "size": "64x64"}


@RIGHT.hook
def map_headers(context: Any, headers: Any) -> Any:
    """A key is for one request. Jobs of pictures refuse what is for an answer with them: see test_jobs_api.py."""
    headers = {name: value for name, value in (headers or {}).items() if name != "prefer"}
    return headers | ({"idempotency-key": uuid.uuid4().hex} if "idempotency-key" in headers else {})


@(RIGHT.include(method="POST").exclude(path_regex="(cancel|remix|edits|profiles)$").parametrize())
@bounded
def test_a_request_that_is_right_is_answered(case: Any) -> None:
    assert case.call_and_validate().status_code == 200


def test_a_description_that_is_wrong_is_found() -> None:
    """The control."""
    app = rest_app(FakeBackend())
    described(app, [200])["/v1/models"]["GET"].Case().call_and_validate()
    app.openapi()["components"]["schemas"]["ModelObject"]["properties"]["reason"] = {"type": "integer"}
    with pytest.raises(FailureGroup, match="reason"):
        described(app, [200])["/v1/models"]["GET"].Case().call_and_validate()


def test_the_description_is_complete() -> None:
    app = rest_app(FakeBackend())
    said = TestClient(app).get("/openapi.json").json()
    routes = {
        (str(route.path).replace(":path", ""), method)
        for route in iter_route_contexts(app.routes)
        for method in route.methods or ()
    }
    told = {(path, method.upper()) for path, operations in said["paths"].items() for method in operations}
    assert routes - told == {("/docs", "GET"), ("/openapi.json", "GET"), ("/v1/outputs/{name}", "HEAD")}
    assert "ValidationError" not in json.dumps(said["components"]["schemas"])
    create = said["paths"]["/v1/images/generations"]["post"]
    assert set(create["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert set(create["responses"]["200"]["content"]) >= {"application/json", "text/event-stream", "application/zip"}
    assert {"504", "400", "401", "403", "404", "408", "413", "415", "422", "429", "499", "500", "503"} <= set(
        create["responses"]
    )
    body = said["components"]["schemas"]["ImageGenerationBody"]["properties"]
    assert [kind.get("maximum") for kind in body["output_compression"]["anyOf"]] == [100, None]
    assert [kind.get("maximum") for kind in body["n"]["anyOf"]] == [10, None]
    fields = said["components"]["schemas"]["ImageGenerationBody"]["properties"]
    assert set(fields) == set(ImageGenerationBody.model_fields)
    assert "queue_full" in create["responses"]["429"]["description"]


def test_the_documents_name_the_same_errors() -> None:
    readme = (Path(__file__).resolve().parents[2] / "service" / "README.md").read_text()
    rows = re.findall(r"^\| ([45][0-9][0-9]) \| ((?:`\w+`(?:, )?)+) \| `\w+` \|", readme, re.MULTILINE)
    documented = {(int(status), code) for status, codes in rows for code in re.findall(r"\w+", codes)}
    declared = {(int(status), code) for status, said in ERRORS.items() for code in said["description"].split(", ")}
    assert documented == declared | {(status, code) for status, code in CODES.items()}


ONLY_REST = {"admin_only", "body_timeout", "request_not_found", "unsupported_media_type"}


def test_the_document_names_the_grpc_status_of_each_error() -> None:
    readme = (Path(__file__).resolve().parents[2] / "service" / "README.md").read_text()
    rows = re.findall(r"^\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \| (.*) \|$", readme, re.MULTILINE)
    said = {(status, code) for names, codes in rows for status in names.split(", ") for code in codes.split("`")}
    given = {(f"`{row.grpc}`", row.code) for row in STATUS.values() if row.http != 400 and row.code not in ONLY_REST}
    assert given - said == set()
    assert ("`RESOURCE_EXHAUSTED`", "out_of_memory") in said


def test_answers_have_no_keys_but_the_declared() -> None:
    client = TestClient(rest_app(FakeBackend()))
    ModelList.model_validate(client.get("/v1/models").json())
    Ready.model_validate(client.get("/readyz").json())
    Alive.model_validate(client.get("/livez").json())
    ErrorResponse.model_validate(client.get("/v2").json())
    for path, model in (("/v1/images/generations", "one"), ("/v1/videos/sync", "film")):
        for form in ("b64_json", "url"):
            body = {"model": model, "prompt": "a", "response_format": form}
            made = GenerationResponse.model_validate(client.post(path, json=body).json())
            assert (made.num_frames, made.fps) == ((5, 16) if model == "film" else (None, None))


def test_the_page_is_whole_without_a_network() -> None:
    app = rest_app(FakeBackend())
    answer = TestClient(app).get("/docs")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"<script|<link|<img|src=|https?://|@import|url\(", answer.text)
    for name in ("/v1/images/generations", "/v1/videos/sync", *VideoGenerationBody.model_fields):
        assert name in answer.text
    anchors = set(re.findall(r"id='([^']+)'", answer.text))
    assert set(re.findall(r"href='#([^']+)'", answer.text)) <= anchors  # every link leads somewhere
    assert {"LoRAChoice", "StreamOptions", "GenerationResponse", "ErrorResponse"} <= anchors
    app.openapi()["info"]["title"] = "<script>"
    assert "<script>" not in TestClient(app).get("/docs").text


def test_the_page_says_first_what_a_caller_needs_first() -> None:
    text = TestClient(rest_app(FakeBackend())).get("/docs").text
    assert text.index("Authorization: Bearer KEY") < text.index("<h2")
    pictures = text[text.index("<h2 id='post/v1/images/generations'") :].partition("<h2 id='get")[0]
    fields = re.findall(r"<tr><td><code>(\w+)</code><td>(?!header)", pictures)
    assert fields[0] == "prompt" and "user" not in fields and "n" in fields
    assert "<code>x-request-timeout-seconds</code><td>header" in pictures
    assert re.search(r"Accepted without effect:.*<code>user</code>.*<code>moderation</code>", pictures)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_the_description_needs_no_key_but_the_right_host(path: str) -> None:
    backend = FakeBackend()
    backend.key, backend.local_only = "sesame", True
    client = TestClient(rest_app(backend))
    assert client.get(path, headers={"host": "localhost:8000"}).status_code == 200
    assert client.get(path, headers={"host": "evil.example"}).json()["error"]["code"] == "forbidden"
