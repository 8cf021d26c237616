"""Pages of other sites: off unless the deployment names them; a browser's question needs no key, its call does."""

import asyncio
from typing import Any

import pytest
from fastapi.testclient import TestClient

from deploy.gateway_spec import GatewaySpec
from deploy.spec import Auth, DeploymentSpec
from service.api.cors import READABLE
from service.api.rest import rest_app
from service.app import serve_config
from service.gateway import Gateway
from service.rollout import changes
from service.rollout.changes import find_gateway_changes
from tests.service.test_gateway import TABLE, opened
from tests.support.backend import FakeBackend, a_model

__all__ = ["opened"]

IMAGES = "/v1/images/generations"
PAGE, OTHER = "https://app.example.com", "https://evil.example"
ALLOWED = "access-control-allow-origin"


@pytest.fixture
def backend() -> FakeBackend:
    backend = FakeBackend()
    backend.cors_origins = (PAGE, "http://localhost:3000")
    return backend


@pytest.fixture
def client(backend: FakeBackend) -> TestClient:
    return TestClient(rest_app(backend), raise_server_exceptions=False)


def asks(client: TestClient, origin: str, method: str = "POST", path: str = IMAGES) -> Any:
    """What a browser asks before it calls."""
    wants = {"access-control-request-method": method, "access-control-request-headers": "authorization,content-type"}
    return client.options(path, headers={"origin": origin} | wants)


def calls(client: TestClient, origin: str, **headers: str) -> Any:
    return client.post(IMAGES, json={"model": "one", "prompt": "a"}, headers={"origin": origin} | headers)


def test_a_browser_that_asks_needs_no_key(client: TestClient, backend: FakeBackend) -> None:
    backend.key = "sesame"
    answer = asks(client, PAGE)
    assert (answer.status_code, answer.headers[ALLOWED]) == (200, PAGE)
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert set(answer.headers["access-control-allow-headers"].replace(" ", "").split(",")) >= {
        "authorization", "content-type",
    }  # fmt: skip
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["access-control-max-age"] == "600"
    assert "Origin" in answer.headers["vary"]


def test_the_call_itself_needs_one_and_may_be_read(client: TestClient, backend: FakeBackend) -> None:
    backend.key = "sesame"
    refused = calls(client, PAGE)
    assert (refused.status_code, refused.headers[ALLOWED]) == (401, PAGE)
    answer = calls(client, PAGE, authorization="Bearer sesame")
    assert (answer.status_code, answer.headers[ALLOWED]) == (200, PAGE)
    assert set(answer.headers["access-control-expose-headers"].split(", ")) == set(READABLE)
    job = client.post(
        "/v1/images/generations",
        json={"prompt": "a", "model": "one"},
        headers={"origin": PAGE, "authorization": "Bearer sesame", "prefer": "respond-async"},
    )
    own = {"access-control-allow-origin", "access-control-expose-headers", "vary", "content-length", "content-type"}
    assert job.status_code == 202 and "location" in job.headers
    assert set(job.headers) <= own | set(READABLE)


@pytest.mark.parametrize("origin", [OTHER, "null", "https://app.example.com.evil.example", "http://app.example.com"])
def test_other_origins_are_refused(client: TestClient, backend: FakeBackend, origin: str) -> None:
    for answer in (asks(client, origin), calls(client, origin)):
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "forbidden"
        assert ALLOWED not in answer.headers
    assert backend.requests == []


def test_another_method_is_refused_in_the_envelope(client: TestClient) -> None:
    answer = asks(client, PAGE, "PUT")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    assert "by PUT" in answer.json()["error"]["message"]


@pytest.mark.parametrize("prompt", ["bug", "full", "lost"])
def test_errors_may_be_read_too(client: TestClient, prompt: str) -> None:
    answer = client.post(IMAGES, json={"model": "one", "prompt": prompt}, headers={"origin": PAGE})
    assert answer.status_code >= 400
    assert answer.headers[ALLOWED] == PAGE
    assert client.get("/nowhere", headers={"origin": PAGE}).headers[ALLOWED] == PAGE


def test_a_stream_may_be_read(client: TestClient) -> None:
    body = {"model": "one", "prompt": "a", "stream": True}
    answer = client.post(IMAGES, json=body, headers={"origin": PAGE})
    assert (answer.headers[ALLOWED], answer.text[-14:]) == (PAGE, "data: [DONE]\n\n")


def test_a_page_that_is_named_may_call_without_keys(client: TestClient, backend: FakeBackend) -> None:
    assert calls(client, PAGE).status_code == 200
    backend.cors_origins = ()
    assert calls(client, PAGE).status_code == 403


def test_a_name_made_to_point_here_is_refused_although_its_page_is_named(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.local_only = True
    assert calls(client, PAGE, host="evil.example").status_code == 403
    assert calls(client, "http://evil.example", host="evil.example").status_code == 403
    assert calls(client, PAGE, host="127.0.0.1:8000").status_code == 200
    assert backend.requests[1:] == []


def test_it_is_off_by_default() -> None:
    client = TestClient(rest_app(FakeBackend()))
    answer = asks(client, PAGE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    for each in (answer, client.get("/v1/models", headers={"origin": PAGE, "authorization": "Bearer x"})):
        assert not [name for name in each.headers if name.startswith("access-control")]


def test_origins_change_while_it_runs(client: TestClient, backend: FakeBackend) -> None:
    assert asks(client, OTHER).status_code == 403
    backend.cors_origins = (OTHER,)
    assert (asks(client, OTHER).status_code, asks(client, PAGE).status_code) == (200, 403)
    backend.cors_origins = ("*",)
    backend.key = "sesame"
    assert asks(client, PAGE).headers[ALLOWED] == "*"
    assert calls(client, PAGE).status_code == 401
    assert calls(client, PAGE, authorization="Bearer sesame").status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["*", "https://app.example.com", "http://localhost:3000", "http://[::1]:8000", "http://10.0.0.7", "https://a:8443"],
)
def test_origins_of_a_file(origin: str) -> None:
    keys = Auth(api_keys_env="KEYS")
    spec = DeploymentSpec(models=(a_model("one"),), gateway=GatewaySpec(cors_origins=(origin,)), auth=keys)
    assert spec.gateway.cors_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    ["", "null", "app.example.com", "https://app.example.com/", "https://App.example.com", "https://*.example.com",
     "https://a:443", "http://a:80", "ftp://a", "https://a b", "https://me@a"],
)  # fmt: skip
def test_what_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="is not what a browser sends as an origin"):
        GatewaySpec(cors_origins=(origin,))


def test_all_pages_only_where_a_key_is_needed() -> None:
    with pytest.raises(ValueError, match=r"gateway.cors_origins is \*"):
        DeploymentSpec(models=(a_model("one"),), gateway=GatewaySpec(cors_origins=("*",)))


def test_a_gateway_hears_of_its_origins(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(opened.reconfigure(TABLE | {"cors_origins": [PAGE]}))
    assert opened.cors_origins == (PAGE,)
    asyncio.run(opened.reconfigure(TABLE))  # as an older version deployed it
    assert opened.cors_origins == ()


def test_a_deployment_says_that_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "listens_at", lambda: ("127.0.0.1", 8000))
    monkeypatch.setattr(changes, "grpc_port", lambda: 9000)
    before = DeploymentSpec(models=(a_model("one"),))
    after = before.model_copy(update={"gateway": GatewaySpec(cors_origins=(PAGE,))})
    present = {application["name"]: application for application in serve_config(before)["applications"]}
    assert find_gateway_changes(before, present) == []
    (said,) = find_gateway_changes(after, present)
    assert "cors_origins" in said
