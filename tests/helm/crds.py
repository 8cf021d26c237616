"""Kinds that are not Kubernetes' own, against their CRDs where those are at hand: objects in, mistakes out.

The CRDs are large files of other projects and not part of this one. They are looked for beside the checkout.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "crds"

FILES = {"RayService": "ray.io_rayservices", "PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"}

DEFAULTS = {"protocol": "TCP"}
"""Of keys of lists that are left out."""

CUSTOM = ("ray.io", "monitoring.coreos.com")


def mistakes(item: Any) -> list[str]:
    """What the CRD of an object says against it; nothing where the CRD is not at hand."""
    if not FOLDER.is_dir():
        return []
    version = item["apiVersion"].partition("/")[2]
    found = _validator(item["kind"], version).iter_errors(item)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]


@functools.cache
def _validator(kind: str, version: str) -> Draft202012Validator:
    text = (FOLDER / f"{FILES[kind]}.yaml").read_text()
    crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = [each["schema"]["openAPIV3Schema"] for each in crd["spec"]["versions"] if each["name"] == version]
    strict = _strict(schema)
    strict["properties"]["metadata"] = {"type": "object"}  # the API server checks it for all kinds alike
    return extend(Draft202012Validator, {"list_map_keys": _differ})(strict)


def _differ(_validator: Any, keys: list[str], items: Any, _schema: Any) -> Iterator[ValidationError]:
    """Two items of a list may not have the same keys."""
    seen: set[tuple[Any, ...]] = set()
    for item in items:
        key = tuple(item.get(name, DEFAULTS.get(name)) for name in keys)
        if key in seen:
            yield ValidationError(f"Duplicate value: {key}")
        seen.add(key)


def _strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as a JSON schema that refuses keys which the API server would drop."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: value for key, value in schema.items() if key in ("type", "enum", "pattern", "minimum", "maximum")}
    properties = schema.get("properties", {})
    if properties:
        made["properties"] = {name: _strict(value) for name, value in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if key in schema:
            made[key] = _strict(schema[key])
    if schema.get("x-kubernetes-list-type") == "map":
        made["list_map_keys"] = schema["x-kubernetes-list-map-keys"]
    # The API server fills in defaults before it looks for what is missing.
    missing = [name for name in schema.get("required", []) if "default" not in properties.get(name, {})]
    return made | ({"required": missing} if missing else {})
