"""`make chart`: writes what the chart repeats of the rest of the project, so that nobody keeps two copies by hand.

The schema of deployment files, what Serve is told of a small deployment, values.yaml, the rules and the dashboards come
in. `values.schema.json`, `files/serve.json`, `files/prometheus`, `files/grafana` and the table of README.md come out.
`tests/helm/test_generated.py` fails when they are stale.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import yaml

from deploy.model_sections import LoRA, WarmupShape
from deploy.model_spec import ModelSpec
from deploy.schema import json_schema
from deploy.spec import DeploymentSpec
from service.app import serve_config
from service.rollout.environment import LOOPBACK_SWITCH, PRIVATE_CLUSTER, PRIVATE_CLUSTER_DEFAULTS

CHART = Path(__file__).resolve().parent
DEPLOY = CHART.parent / "deploy"
TABLE = re.compile(r"(?<=<!-- values -->\n).*?(?=<!-- end of values -->)", re.DOTALL)

COPIED = {"prometheus": ("*.yml", "*.yaml"), "grafana": ("*.json",)}
"""Files of deploy/ that become objects of Kubernetes. Of Prometheus's, those with groups of rules."""

ENUMERATIONS = {
    "ray.authMode": ["token", "disabled"],
    "upgrade.type": ["NewCluster", "None"],
    "service.type": ["ClusterIP", "NodePort", "LoadBalancer"],
    "image.pullPolicy": ["Always", "IfNotPresent", "Never"],
}

AT_LEAST_ONE = ("hosts", "maxReplicas", "drainSeconds", "intervalSeconds", "objectStoreMiB")

FREE = ("podSecurityContext", "securityContext", "tests.fields")
"""Mappings of Kubernetes or of the operator's own keys."""

OF_GROUPS = ("accelerator", "hosts", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "spread")
"""Keys of nodes that the head does not have: there is one, and it runs no gang."""

NODE_NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$"}


def generated() -> dict[Path, str]:
    """The text of each generated file, by its path."""
    values = CHART / "values.yaml"
    readme = CHART / "README.md"
    files = {
        CHART / "values.schema.json": json.dumps(values_schema(yaml.safe_load(values.read_text())), indent=1) + "\n",
        CHART / "files" / "serve.json": json.dumps(serve_defaults(), indent=1) + "\n",
        readme: TABLE.sub(lambda _: values_table(values.read_text()), readme.read_text()),
    }
    for folder, patterns in COPIED.items():
        for source in sorted(path for pattern in patterns for path in (DEPLOY / folder).rglob(pattern)):
            if folder == "grafana" or "groups" in (yaml.safe_load(source.read_text()) or {}):
                files[CHART / "files" / folder / source.name] = source.read_text()
    return files


def serve_defaults() -> dict[str, Any]:
    """What a template needs to write what `spray build` prints: that of a small deployment, with every default.

    Its one model has one item in each list of sections, which says what an item has besides what is written.
    """
    lists = {"loras": (LoRA(name="a", source="/a"),), "warmup_shapes": (WarmupShape(width=16, height=16),)}
    model = ModelSpec(name="a", source="/a", **lists)
    environment = PRIVATE_CLUSTER | PRIVATE_CLUSTER_DEFAULTS
    return {
        "ray_version": ray.__version__,
        "environment": {k: v for k, v in environment.items() if k not in (*LOOPBACK_SWITCH, "RAY_AUTH_MODE")},
        "serve": serve_config(DeploymentSpec(models=(model,))),
    }


def values_schema(values: dict[str, Any]) -> dict[str, Any]:
    """The schema of values: sections of a deployment file as in `deploy.spec`, the others as values.yaml shows."""
    deployment = json_schema()
    sections = deployment["properties"]
    node = {key: _shape(value, key) for key, value in values["nodeDefaults"].items()}
    properties = {key: _shape(value, key) for key, value in values.items() if key not in sections}
    named = node | {"name": NODE_NAME}
    alone = {key: shape for key, shape in node.items() if key not in OF_GROUPS}
    for key, shapes in (("head", alone), ("gatewayNodes", named)):
        properties[key] = {"type": "object", "properties": shapes, "additionalProperties": False}
    group = {"type": "object", "properties": named, "required": ["name"]}
    properties["groups"] = {"type": "array", "items": group | {"additionalProperties": False}}
    properties["global"] = {"type": "object"}
    # A chart without models is linted too; the templates refuse it.
    return {
        "$schema": deployment["$schema"],
        "$defs": deployment["$defs"],
        "type": "object",
        "properties": sections | properties,
        "additionalProperties": False,
    }


def _shape(value: Any, path: str) -> dict[str, Any]:
    """The schema of values like this one."""
    key = path.rpartition(".")[2]
    if path in ENUMERATIONS:
        return {"enum": ENUMERATIONS[path]}
    if isinstance(value, dict):
        if not value or path in FREE:
            return {"type": "object"}
        inner = {name: _shape(item, f"{path}.{name}") for name, item in value.items()}
        return {"type": "object", "properties": inner, "additionalProperties": False}
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "integer", "minimum": int(key in AT_LEAST_ONE)}
    if isinstance(value, list):
        return (
            {"type": "array", "items": {"type": "string"}} if value and isinstance(value[0], str) else {"type": "array"}
        )
    return {"type": "string"}


def values_table(text: str) -> str:
    """The values with their defaults and meanings, as a table of Markdown."""
    values = yaml.safe_load(text)
    rows = [f"| `{path}` | {_default(values, path)} | {meaning} |" for path, meaning in described(text)]
    return "\n".join(["", "| value | default | |", "|---|---|---|", *rows, "", ""])


def described(text: str) -> Iterator[tuple[str, str]]:
    """The dotted path of each value that has a comment with `--`, and that comment."""
    above: list[str] = []
    at: list[str] = []
    for line in text.splitlines():
        if found := re.match(r" *# (-- )?(.*)", line):
            above = [found[2]] if found[1] else [*above, found[2]] if above else []
        elif key := re.match(r"( *)([\w.-]+):", line):
            at = [*at[: len(key[1]) // 2], key[2]]
            if above:
                yield ".".join(at), " ".join(above)
            above = []


def _default(values: dict[str, Any], path: str) -> str:
    for key in path.split("."):
        values = values[key]
    return f"`{json.dumps(values)}`" if len(json.dumps(values)) <= 40 else "see values.yaml"


def main() -> None:
    """Write what differs, and remove copies whose source is gone."""
    files = generated()
    for path in (path for folder in COPIED for path in (CHART / "files" / folder).glob("*") if path not in files):
        path.unlink()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(CHART.parent))


if __name__ == "__main__":
    main()
