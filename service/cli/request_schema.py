"""The JSON schema of one model's requests: for `spray schema MODEL`.

The server's descriptions of its API and of the model come in; a JSON schema of the request's body goes out, with the
model's own limits and defaults instead of those of all models.
"""

import copy
from collections.abc import Iterator
from typing import Any

from service.api.bodies import WITHOUT_EFFECT
from service.api.schemas import PATHS

REF = "#/components/schemas/"


def request_schemas(description: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The JSON schemas of the bodies that the model takes, by path.

    Args:
        description: `/openapi.json`.
        model: `/v1/models/{name}`. Its tasks may not be known yet; then each path is there.
    """
    tasks = model["tasks"] or PATHS
    return {path: _schema(description, model, path) for task, path in PATHS.items() if task in tasks}


def _schema(description: dict[str, Any], model: dict[str, Any], path: str) -> dict[str, Any]:
    content = description["paths"][path]["post"]["requestBody"]["content"]
    schemas = description["components"]["schemas"]
    name = content["application/json"]["schema"]["$ref"].removeprefix(REF)
    schema = copy.deepcopy(schemas[name])
    for field, own in _own(model).items():
        if field in schema["properties"]:
            schema["properties"][field] = _narrowed(schema["properties"][field], own)
    refused = () if model["loras"] else ("loras", "lora")
    if path != PATHS["text-to-video"]:
        refused = (*refused, "guidance_scale_2")  # pictures do not have it, whatever the model
    fields = schema["properties"].items()
    of_use = sorted(fields, key=lambda field: field[1].get("description") == WITHOUT_EFFECT.description)  # those first
    schema["properties"] = {name: field for name, field in of_use if name not in refused}
    used, waiting = dict[str, Any](), list(_names(schema))
    while waiting:
        if (other := waiting.pop()) not in used:
            used[other] = _moved(copy.deepcopy(schemas[other]))
            waiting += _names(schemas[other])
    if model["loras"] and "LoRAChoice" in used:
        used["LoRAChoice"]["properties"]["name"] = {"type": "string", "enum": model["loras"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_moved(schema), "$defs": used}


def _own(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The model's own limits and defaults, by field."""
    defaults, limits = model["defaults"], model["limits"]
    multiple = limits["size_multiple"]
    own: dict[str, dict[str, Any]] = {
        "model": {"enum": [model["id"], *model["aliases"]]},
        "size": {"default": f"{defaults['width']}x{defaults['height']}"},
        "width": {"maximum": limits["max_width"], "multipleOf": multiple, "default": defaults["width"]},
        "height": {"maximum": limits["max_height"], "multipleOf": multiple, "default": defaults["height"]},
        "n": {"maximum": limits["max_n"], "default": 1},
        "num_outputs_per_prompt": {"maximum": limits["max_n"]},
        "num_frames": {"maximum": limits["max_num_frames"]},
        "num_inference_steps": {"maximum": limits["max_num_inference_steps"]},
    }
    for field in ("num_inference_steps", "guidance_scale", "guidance_scale_2", "num_frames", "fps"):
        if defaults.get(field) is not None:
            own.setdefault(field, {})["default"] = defaults[field]
    return own


def _narrowed(field: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field with the model's own bounds, never wider than those of the API."""
    bounds = {name: value for name, value in own.items() if name != "default"}

    def narrowed(kind: dict[str, Any]) -> dict[str, Any]:
        most = {"maximum": min(bounds["maximum"], kind["maximum"])} if bounds.keys() & kind.keys() else {}
        return kind if kind.get("type") == "null" else kind | bounds | most

    inner = {"anyOf": [narrowed(kind) for kind in field["anyOf"]]} if "anyOf" in field else narrowed(field)
    return field | inner | ({"default": own["default"]} if "default" in own else {})


def _names(schema: Any) -> Iterator[str]:
    """The names of the schemas that a schema refers to."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].removeprefix(REF)
        for value in schema.values():
            yield from _names(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _names(value)


def _moved(schema: Any) -> Any:
    """The same schema with references into its own `$defs`, so that it is complete."""
    if isinstance(schema, dict):
        return {
            name: f"#/$defs/{value.removeprefix(REF)}" if name == "$ref" and isinstance(value, str) else _moved(value)
            for name, value in schema.items()
        }
    return [_moved(value) for value in schema] if isinstance(schema, list) else schema
