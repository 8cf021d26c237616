"""What the chart repeats of the rest of the project is what the rest of the project says now."""

from pathlib import Path

import pytest
import yaml

from deploy.schema import json_schema
from helm.generate import COPIED, described, generated, values_schema
from service.rollout.environment import PRIVATE_CLUSTER, PRIVATE_CLUSTER_DEFAULTS
from tests.helm.chart import CHART, defaults, profile, render

FILES = generated()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CHART)))
def test_it_is_fresh(path: Path) -> None:
    assert path.read_text() == FILES[path], "run `make chart`"


def test_no_copy_outlives_its_source() -> None:
    copies = {path for folder in COPIED for path in (CHART / "files" / folder).glob("*")}
    assert copies <= set(FILES), "run `make chart`"


def test_every_value_is_described() -> None:
    """But for those whose keys are."""
    told = {path for path, _ in described((CHART / "values.yaml").read_text())}

    def silent(value: object, path: str) -> list[str]:
        if path in told:
            return []
        inner = value.items() if isinstance(value, dict) else ()
        return [name for key, item in inner for name in silent(item, f"{path}.{key}")] or ([] if inner else [path])

    assert [name for key, value in defaults().items() for name in silent(value, key)] == []


def test_models_have_the_schema_of_deployment_files_and_every_key_is_known() -> None:
    schema = values_schema(defaults())
    assert schema["properties"]["models"] == json_schema()["properties"]["models"]
    assert schema["$defs"] == json_schema()["$defs"]

    def loose(part: object, path: str) -> list[str]:
        if isinstance(part, dict):
            own = [path] if "properties" in part and part.get("additionalProperties") is not False else []
            return own + [name for key, item in part.items() for name in loose(item, f"{path}/{key}")]
        return []

    assert loose(schema["properties"], "") == []
    assert schema["additionalProperties"] is False


def test_every_node_has_the_environment_that_spray_sets_on_its_own_clusters() -> None:
    wanted = dict(PRIVATE_CLUSTER | PRIVATE_CLUSTER_DEFAULTS)
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE"):  # of loopback; KubeRay sets it
        del wanted[name]
    (service,) = [each for each in render(profile("trial")) if each["kind"] == "RayService"]
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        container = group["template"]["spec"]["containers"][0]
        assert {v["name"]: v.get("value") for v in container["env"]}.items() >= wanted.items()


def test_versions_are_those_of_the_project() -> None:
    pinned = dict(
        line.split("==") for line in (CHART.parent / "constraints.txt").read_text().splitlines() if "==" in line
    )
    (service,) = [each for each in render(profile("trial")) if each["kind"] == "RayService"]
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == pinned["ray"]
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert f'version = "{version}"' in (CHART.parent / "pyproject.toml").read_text()
