"""What an upgrade restarts: a change of models changes serveConfigV2 alone, so no pod and no other model restarts.

What restarts ends after its longest request: pods, and the old cluster of two.
"""

import json
from typing import Any

import pytest

from tests.helm.chart import (
    Values,
    cases,
    of_kind,
    pod_templates,
    profile,
    ray_service,
    render,
    serve_config_of,
    with_values,
)

CASES = cases()


def changed(change: Any) -> Values:
    values = profile("production")
    change(values)
    return values


def more_gangs(values: Values) -> None:
    values["models"][0]["autoscaling"] = {"min_replicas": 0, "max_replicas": 5, "target_backlog_seconds": 5}


def one_more_model(values: Values) -> None:
    values["models"].append({"name": "flux", "source": "org/flux", "placement": {"accelerator_type": "H100"}})


def one_model_less(values: Values) -> None:
    del values["models"][1]


def other_limits(values: Values) -> None:
    values["models"][0] |= {"limits": {"max_n": 1}, "max_queued": 3, "grace_period_s": 1200, "aliases": ["a"]}
    values["limits"] = {"max_body_bytes": 1 << 24}


def other_degrees(values: Values) -> None:
    values["models"][0]["parallel"] = {"ulysses_degree": 4}


LIVE = [more_gangs, one_more_model, one_model_less, other_limits, other_degrees]


@pytest.mark.parametrize("change", LIVE, ids=lambda change: change.__name__)
def test_models_change_and_no_pod_does(change: Any) -> None:
    before, after = render(profile("production")), render(changed(change))
    assert json.dumps(pod_templates(before)) == json.dumps(pod_templates(after))
    told = [{each["name"]: each for each in serve_config_of(objects)["applications"]} for objects in (before, after)]
    restarted = {name for name in set(told[0]) & set(told[1]) if told[0][name]["args"] != told[1][name]["args"]}
    assert restarted == ({"model-qwen-image"} if change is other_degrees else set())
    configs = [ray_service(objects)["spec"] for objects in (before, after)]
    assert configs[0]["rayClusterConfig"] == configs[1]["rayClusterConfig"]
    assert configs[0].pop("serveConfigV2") != configs[1].pop("serveConfigV2")
    assert configs[0] == configs[1]


def test_where_there_is_no_room_old_gangs_stop_first() -> None:
    """By the same upgrade that changes the model, and no pod changes."""
    values = with_values(changed(other_degrees), {"upgrade": {"newGangsFirst": False}})
    before, after = render(profile("production")), render(values)
    assert pod_templates(before) == pod_templates(after)
    surges = [
        [deployment.get("max_surge_percent") for each in config["applications"] for deployment in each["deployments"]]
        for config in (serve_config_of(before), serve_config_of(after))
    ]
    gateway = surges[0][-1]
    assert surges == [[1, 1, 1, gateway], [0, 0, 0, gateway]]


def test_values_of_an_older_chart_have_new_gangs_first() -> None:
    """As `helm upgrade --reuse-values` takes them: without the key."""
    config = serve_config_of(render(with_values(profile("production"), {"upgrade": {"newGangsFirst": None}})))
    (model, *_) = config["applications"]
    assert model["deployments"][0]["max_surge_percent"] == 1


@pytest.mark.parametrize(
    "values",
    [
        {"image": {"tag": "0.2.0"}},
        {"nodeDefaults": {"env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}},
        {"gateway": {"port": 8088}},
        {"upgrade": {"drainSeconds": 4000}},
    ],
)
def test_pods_change_with_image_environment_ports_and_grace(values: Values) -> None:
    """The control: then KubeRay starts a second cluster, and the old one lives on until its requests may have ended."""
    before, after = render(profile("production")), render(with_values(profile("production"), values))
    assert all(pod_templates(before)[name] != pod_templates(after)[name] for name in ("gateways", "h100-4x"))
    spec = ray_service(after)["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["rayClusterDeletionDelaySeconds"] >= 1800


def test_a_new_version_of_the_chart_alone_changes_no_pod() -> None:
    """Its labels are those of objects, not of pods."""
    for template in pod_templates(render(profile("production"))).values():
        assert "helm.sh/chart" not in json.dumps(template)
        assert "app.kubernetes.io/version" not in json.dumps(template)


def test_a_group_that_is_appended_leaves_the_others_as_they_are() -> None:
    values = profile("production")
    values["groups"].append({"name": "l40s", "gpus": 1})
    before, after = pod_templates(render(profile("production"))), pod_templates(render(values))
    assert {name: after[name] for name in before} == before
    assert list(after) == [*before, "l40s"]


@pytest.mark.parametrize("name", CASES)
def test_pods_end_after_their_longest_request(name: str) -> None:
    objects = render(CASES[name])
    longest = max(model.get("grace_period_s", 900) for model in CASES[name]["models"])
    waited = max(
        (model.get("max_queued_s", 600) or 0) + model.get("grace_period_s", 900) for model in CASES[name]["models"]
    )
    asleep = [model for model in CASES[name]["models"] if model.get("autoscaling", {}).get("min_replicas") == 0]
    waited += max((model.get("timeouts", {}).get("startup_s", 1800) for model in asleep), default=0)
    assert ray_service(objects)["spec"]["rayClusterDeletionDelaySeconds"] >= waited
    for group, template in pod_templates(objects).items():
        assert group == "head" or template["spec"]["terminationGracePeriodSeconds"] >= longest + 30


@pytest.mark.parametrize("name", ["an ingress", "routes"])
def test_nothing_on_the_way_gives_up_before_the_longest_request_ends(name: str) -> None:
    """It may wait for its turn, and is drawn then."""
    values = with_values(CASES[name])
    values["models"][0] |= {"max_queued_s": 1200.5, "grace_period_s": 1800}
    objects = render(values)
    assert ray_service(objects)["spec"]["rayClusterDeletionDelaySeconds"] == 3001
    key = "nginx.ingress.kubernetes.io/proxy-read-timeout"
    told = {each["metadata"]["annotations"][key] for each in of_kind(objects, "Ingress")}
    told |= {rule["timeouts"]["request"] for each in of_kind(objects, "HTTPRoute") for rule in each["spec"]["rules"]}
    assert told == ({"3001"} if name == "an ingress" else {"3001s"})
    variables = [each for pod in of_kind(objects, "Pod") for each in pod["spec"]["containers"][0]["env"]]
    assert {each["value"] for each in variables if each["name"] == "SPRAY_TIMEOUT"} == {"3001"}
