"""The schema for editors: everything in it is explained, and it accepts what spray accepts."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from deploy.schema import json_schema
from deploy.spec import DeploymentSpec
from sp_core.degrees import ParallelDegrees

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "deploy").glob("*.yaml"))
SCHEMA = json_schema()
UNITS = {
    "_s": "second",
    "_seconds": "second",
    "_bytes": "bytes",
    "width": "pixels",
    "height": "pixels",
    "memory": "bytes",
}
UNITS |= {"_steps": "steps", "_frames": "frames", "fps": "per second", "size_multiple": "pixels", "port": "port"}
"""How a field's name ends, and the word that its description must have."""


def sections() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "DeploymentSpec", SCHEMA
    yield from SCHEMA["$defs"].items()


FIELDS = [
    pytest.param(name, field, name in section.get("required", []), id=f"{title}.{name}")
    for title, section in sections()
    for name, field in section["properties"].items()
]


@pytest.mark.parametrize(("name", "field", "required"), FIELDS)
def test_every_field_is_explained(name: str, field: dict[str, Any], required: bool) -> None:
    assert field["description"]
    assert required or "default" in field
    for ending, unit in UNITS.items():
        assert not name.endswith(ending) or unit in field["description"]


def test_it_has_all_sections_and_refuses_other_keys() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for title, section in sections():
        assert section["additionalProperties"] is False, title
        assert "\n" not in section["description"], title
    assert set(SCHEMA["properties"]) == set(DeploymentSpec.model_fields)


def test_degrees_are_explained_where_they_are_defined() -> None:
    found = SCHEMA["$defs"]["ParallelDegrees"]["properties"]
    assert list(found) == [field.name for field in fields(ParallelDegrees)]
    for field in fields(ParallelDegrees):
        assert found[field.name]["description"] == field.metadata["description"]
        assert (found[field.name]["minimum"], found[field.name]["default"]) == (1, 1)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_files_are_valid(file: Path) -> None:
    Draft202012Validator(SCHEMA).validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"models": [{"name": "a"}]},
        {"models": [{"name": "a", "source": "b", "paralel": {}}]},
        {"models": [{"name": "a", "source": "b", "parallel": {"ulysses_degree": 0}}]},
        {"models": [{"name": "a", "source": "b", "parallel": {"ulyses_degree": 2}}]},
        {"models": [{"name": "a", "source": "b", "device": "tpu"}]},
        {"models": [{"name": "a", "source": "b", "revision": 7}]},
        {"models": [], "gateway": {"port": 70000}},
    ],
)
def test_an_editor_sees_what_spray_would_refuse(wrong: Any) -> None:
    assert not Draft202012Validator(SCHEMA).is_valid(wrong)
