"""What a gateway counts of calls, and tells of models."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY

from deploy.model_sections import Autoscaling
from service.api.observed import key_name
from service.api.rest import rest_app
from service.jobs.records import Queued
from service.names import app_name
from service.state.model_states import ModelState, wanted_reason
from service.state.observed import ObservedModels
from tests.support.backend import FakeBackend, a_model


def calls() -> dict[tuple[str, str, str], float]:
    """By route, code and key."""
    return {
        (sample.labels["route"], sample.labels["code"], sample.labels["key"]): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "spray_api_requests_total"
    }


class NamedBackend(FakeBackend):
    """Knows the name of its one key."""

    def admit(self, authorization: str | None, admin: bool = False) -> None:
        super().admit(authorization, admin)
        key_name.set("web")


@pytest.fixture
def client() -> Iterator[TestClient]:
    backend = NamedBackend()
    backend.key = "secret"
    with TestClient(rest_app(backend), raise_server_exceptions=False) as asking:
        yield asking


def test_calls_count_by_route_code_and_key(client: TestClient) -> None:
    before = calls()
    body = {"model": "one", "prompt": "a", "size": "64x64"}
    allowed = {"authorization": "Bearer secret"}
    url = "/v1/images/generations"
    for given, headers in ((body, allowed), (body, allowed), (body, {}), (body | {"model": "nope"}, allowed)):
        client.post(url, json=given, headers=headers)
    client.post(url, json=body | {"prompt": "bug"}, headers=allowed)
    client.get("/v1/models/two", headers=allowed)
    for made_up in ("/v1/nothing", "/v1/nothing/else"):
        client.get(made_up)
    counted = {key: value - before.get(key, 0.0) for key, value in calls().items() if value != before.get(key, 0.0)}
    assert counted == {
        (url, "200", "web"): 2,
        (url, "401", ""): 1,
        (url, "404", "web"): 1,
        (url, "500", "web"): 1,
        ("/v1/models/{name:path}", "200", "web"): 1,
        ("unknown", "404", ""): 2,
    }


def gauge(name: str, **labels: str) -> Any:
    return str(REGISTRY.get_sample_value(name, labels))


def test_gauges_of_a_model_and_its_end() -> None:
    scaling = Autoscaling(min_replicas=0, max_replicas=4, target_backlog_seconds=30)
    model, ours = a_model("seen", autoscaling=scaling), ObservedModels()
    gangs = ({"request_s": 2.0, "now": {}}, {"request_s": 4.0, "now": {}})
    state = ModelState("running", replicas={"RUNNING": 2}, queued=5, gangs=gangs)
    ours.tell({"seen": model}, {"seen": state}, {app_name("seen"): 3})
    assert gauge("spray_backlog_seconds", model="seen", replica="") == "15.0"  # five requests of three seconds
    assert gauge("spray_gangs", model="seen", state="running") == "2.0"
    assert gauge("spray_gangs_limit", model="seen", bound="max") == "4.0"
    assert gauge("spray_target_backlog_seconds", model="seen") == "30.0"
    assert gauge("spray_gangs_wanted", model="seen", reason="load") == "3.0"
    ours.tell({"seen": model}, {"seen": ModelState("asleep", queued=1)}, {app_name("seen"): 4})
    assert gauge("spray_backlog_seconds", model="seen", replica="") == "3.0"  # what a request took is not forgotten
    assert gauge("spray_gangs_wanted", model="seen", reason="load") == "nan"  # not exported
    assert gauge("spray_gangs_wanted", model="seen", reason="maximum") == "4.0"
    ours.tell({"seen": model}, {"seen": ModelState("asleep", queued=1)}, {}, {"seen": Queued(2.5, 20.0)})
    assert gauge("spray_requests_queued", model="seen") == "3.5"  # this gateway's share of the jobs in the store, too
    assert gauge("spray_backlog_seconds", model="seen", replica="") == "23.0"
    ours.tell({}, {}, {})
    for name, labels in (
        ("backlog_seconds", {"replica": ""}),
        ("requests_queued", {}),
        ("target_backlog_seconds", {}),
        ("gangs", {"state": "running"}),
        ("gangs_limit", {"bound": "min"}),
        ("gangs_wanted", {"reason": "maximum"}),
    ):
        assert gauge(f"spray_{name}", model="seen", **labels) == "nan", name


@pytest.mark.parametrize(
    ("fewest", "most", "target", "reason"),
    [(0, 4, 0, "minimum"), (1, 4, 1, "minimum"), (1, 4, 2, "load"), (1, 4, 4, "maximum"), (2, 2, 2, "fixed")],
)
def test_why_so_many_gangs(fewest: int, most: int, target: int, reason: str) -> None:
    model = a_model("wanted", autoscaling=Autoscaling(min_replicas=fewest, max_replicas=most))
    assert wanted_reason(model, target) == reason
