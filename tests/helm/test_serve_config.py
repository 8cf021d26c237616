"""serveConfigV2 is what `spray build` prints of the same deployment, for all values and every file that ships."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec
from service.app import gang_app, gateway_app, serve_config
from tests.helm.chart import (
    CHART,
    EVERY_KEY,
    GPU_GROUPS,
    VARIATIONS,
    Values,
    cases,
    defaults,
    profile,
    render,
    serve_config_of,
    with_values,
)

CASES = cases()
SHIPPED = sorted((CHART.parent / "deploy").glob("*.yaml"))
BUILDERS = {"service.app:gang_app": gang_app, "service.app:gateway_app": gateway_app}


def deployment(values: Values) -> DeploymentSpec:
    """The deployment that values stand for: their sections, and the folders of the chart's volumes."""
    merged = without_none(with_values(defaults(), values))
    sections = {name: merged[name] for name in DeploymentSpec.model_fields}
    for section, key in (("gateway", "grpc_port"), ("metrics", "port")):  # helm takes out what is null
        sections[section].setdefault(key, None)
    sections["storage"].setdefault("models", "/models/hub")
    if merged["ingress"]["enabled"] and merged["ingress"]["tlsSecret"]:
        sections["gateway"].setdefault("public_url", f"https://{merged['ingress']['host']}")
    if merged["outputs"].get("size") or merged["outputs"].get("existingClaim"):
        sections["storage"]["outputs"] = sections["storage"].get("outputs", {}) | {"folder": "/outputs"}
    if merged["outputs"]["s3"].get("url"):
        sections["storage"]["outputs"] = sections["storage"].get("outputs", {}) | {
            "url": merged["outputs"]["s3"]["url"]
        }
    if merged["jobs"].get("existingSecret"):
        sections["storage"]["jobs_url_env"] = "SPRAY_JOBS_URL"
    if merged["state"].get("size") or merged["state"].get("existingClaim"):
        sections["storage"] = {"jobs": "/var/lib/spray"} | sections["storage"]
        if sections["storage"].get("jobs_url_env"):
            del sections["storage"]["jobs"]
        sections["storage"]["idempotency"] = sections["storage"].get("idempotency", {}) | {"folder": "/var/lib/spray"}
    if merged["apiKeys"].get("existingSecret"):
        sections["auth"]["api_keys_file"] = "/etc/spray/keys/keys.yaml"
    return DeploymentSpec.model_validate(sections)


def built(values: Values) -> Any:
    """What `spray build` prints of it, with what only the chart knows."""
    config = serve_config(deployment(values))
    merged, (*gangs, gateway) = with_values(defaults(), values), config["applications"]
    if not merged["upgrade"]["newGangsFirst"]:
        for application in gangs:
            application["deployments"][0]["max_surge_percent"] = 0  # as `spray deploy --allow-downtime` does
    if (nodes := merged["gatewayNodes"]["minReplicas"]) >= 2:  # so that not all gateways end with one node
        (options,) = gateway["deployments"]
        options["max_replicas_per_node"] = -(-options["num_replicas"] // nodes)
    return config


def without_none(values: Any) -> Any:
    """What helm makes of null outside of lists."""
    if isinstance(values, dict):
        return {key: without_none(value) for key, value in values.items() if value is not None}
    return values


@pytest.mark.parametrize("name", CASES)
def test_the_template_writes_what_spray_build_prints(name: str) -> None:
    rendered = serve_config_of(render(CASES[name]))
    assert rendered == built(CASES[name])
    schema = ServeDeploySchema.model_validate(rendered)
    for application in schema.applications:
        assert BUILDERS[application.import_path](application.args)._bound_deployment.name == (
            application.deployments[0].name
        )


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_a_deployment_file_is_given_to_helm_as_it_is(file: Path) -> None:
    """What a cluster needs besides is an image, nodes, an address, and folders instead of relative paths."""
    given: Values = yaml.safe_load(file.read_text())
    for model in given["models"]:
        model["source"] = model["source"].replace("..", "")
    nodes = {"gateway": {"host": "0.0.0.0"}, "groups": [{"name": "gpus", "gpus": 8, "maxReplicas": 1}]}
    values = with_values(given, nodes, {"auth": {"insecure": True}, "image": profile("trial")["image"]})
    assert serve_config_of(render(values)) == built(values)


def test_every_key_of_a_section_is_in_the_variation_that_has_them_all() -> None:
    """But for those of which only one may be set: another variation has the other."""
    varied = VARIATIONS["every key of the sections"]

    def missing(schema: type[BaseModel], given: Values, path: str) -> list[str]:
        found = []
        for name, field in schema.model_fields.items():
            if name not in given:
                found.append(f"{path}.{name}")
            elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found += missing(field.annotation, given[name], f"{path}.{name}")
        return found

    sections = {name: field.annotation for name, field in DeploymentSpec.model_fields.items() if name != "models"}
    assert [name for key, schema in sections.items() for name in missing(schema, varied[key], key)] == []


def test_every_key_of_a_model_is_in_the_variation_that_has_them_all() -> None:
    """Else a new key might reach Serve by `spray build` and not by the chart."""
    assert set(EVERY_KEY) == set(ModelSpec.model_fields)
    assert ModelSpec.model_validate(EVERY_KEY).model_dump(mode="json").items() >= {"max_queued": 7}.items()
    assert GPU_GROUPS["groups"]
