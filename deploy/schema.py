"""The schema of a deployment file for other tools: `deploy.spec` in, JSON schema (draft 2020-12) out.

`spray schema` prints it. An editor that speaks YAML checks and explains a file by it, when the file begins with
`# yaml-language-server: $schema=FILE`.
"""

import inspect
import re
from dataclasses import fields
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from deploy.spec import DeploymentSpec
from sp_core.degrees import ParallelDegrees


class _Untitled(GenerateJsonSchema):
    """Without a title for each field, which would only repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


def json_schema() -> dict[str, Any]:
    """The schema; each field has a description, and a default where it may be left out."""
    schema = DeploymentSpec.model_json_schema(schema_generator=_Untitled)
    degrees = schema["$defs"][ParallelDegrees.__name__]
    degrees["description"] = (inspect.getdoc(ParallelDegrees) or "").partition("\n")[0]
    for name, description in degree_descriptions().items():
        degrees["properties"][name] |= {"description": description, "minimum": 1}
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def degree_descriptions() -> dict[str, str]:
    """What each degree is, read from where it is defined: sp_core is without pydantic, so its fields have none."""
    attributes = (inspect.getdoc(ParallelDegrees) or "").partition("Attributes:")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", attributes, re.MULTILINE)
    described = {name: re.sub(r"\s+", " ", text) for name, text in found}
    return {field.name: described[field.name] for field in fields(ParallelDegrees)}
