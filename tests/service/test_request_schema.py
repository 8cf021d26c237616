"""`spray schema MODEL` says what the API takes: what is right by the schema is answered, the rest is refused."""

from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient

from service.api.rest import rest_app
from service.cli.request_schema import request_schemas
from tests.support.backend import FakeBackend, a_model

IMAGES, VIDEOS, EDITS = "/v1/images/generations", "/v1/videos/sync", "/v1/images/edits"


@pytest.fixture(scope="module")
def client() -> TestClient:
    backend = FakeBackend()
    backend._models.append(a_model("plain", tasks=("text-to-image",)).model_copy(update={"loras": ()}))
    return TestClient(rest_app(backend))


def schemas(client: TestClient, model: str) -> dict[str, Any]:
    return request_schemas(client.get("/openapi.json").json(), client.get(f"/v1/models/{model}").json())


@pytest.mark.parametrize(
    ("model", "paths"), [("paint", [IMAGES]), ("brush", [IMAGES]), ("film", [VIDEOS]), ("one", [IMAGES, VIDEOS, EDITS])]
)
def test_a_model_is_asked_where_its_tasks_are(client: TestClient, model: str, paths: list[str]) -> None:
    found = schemas(client, model)
    assert list(found) == paths
    for schema in found.values():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert "#/components" not in str(schema)


BODIES: list[tuple[str, str, dict[str, Any]]] = [
    ("paint", IMAGES, {}),
    ("paint", IMAGES, {"model": "pencil"}),
    ("paint", IMAGES, {"n": 2, "seed": None}),
    ("paint", IMAGES, {"n": 5}),
    ("paint", IMAGES, {"width": 64, "height": 64}),
    ("paint", IMAGES, {"width": 72, "height": 64}),
    ("paint", IMAGES, {"width": 4096, "height": 64}),
    ("paint", IMAGES, {"num_inference_steps": 101}),
    ("paint", IMAGES, {"guidance_scale": None, "guidance_scale_2": 3}),
    ("paint", IMAGES, {"loras": [{"name": "ink"}]}),
    ("paint", IMAGES, {"loras": [{"name": "chalk"}]}),
    ("plain", IMAGES, {"loras": [{"name": "ink"}]}),
    ("paint", IMAGES, {"tea": 1}),
    ("film", VIDEOS, {"num_frames": 9, "fps": 8, "guidance_scale_2": 3}),
    ("film", VIDEOS, {"num_frames": 10}),
    ("film", VIDEOS, {"n": 2}),
]


@pytest.mark.parametrize(("model", "path", "body"), BODIES, ids=str)
def test_the_schema_and_the_api_agree(client: TestClient, model: str, path: str, body: dict[str, Any]) -> None:
    body = {"model": model, "prompt": "a"} | body
    schema = schemas(client, model)[path]
    right = jsonschema.Draft202012Validator(schema).is_valid(body)
    assert client.post(path, json=body).status_code == (200 if right else 400)


def test_some_bodies_are_right_and_some_are_not(client: TestClient) -> None:
    """The control: a schema that takes all, or nothing, would agree with half of the bodies."""
    right = [
        jsonschema.Draft202012Validator(schemas(client, model)[path]).is_valid({"model": model, "prompt": "a"} | body)
        for model, path, body in BODIES
    ]
    assert right.count(True) == 6 and right.count(False) == 10


def test_the_defaults_are_the_models(client: TestClient) -> None:
    fields = schemas(client, "film")[VIDEOS]["properties"]
    defaults = {name: fields[name]["default"] for name in ("size", "num_frames", "num_inference_steps", "fps", "n")}
    assert defaults == {"size": "64x64", "num_frames": 5, "num_inference_steps": 4, "fps": 16, "n": 1}
    assert next(iter(fields)) == "prompt"  # before those that have no effect
