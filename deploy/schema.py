"""The schema of a deployment file for other tools: `deploy.spec` in, JSON schema (draft 2020-12) out.

`spray schema` prints it. An editor with YAML support checks and explains a file by it if the file begins with
`# yaml-language-server: $schema=FILE`.
"""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from deploy.spec import DeploymentSpec
from sp_core.degrees import ParallelDegrees


class _Untitled(GenerateJsonSchema):
    """Leaves out the title of each field, which only repeats its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """The schema. Each field has a description, and a default where it may be left out."""
    schema = DeploymentSpec.model_json_schema(schema_generator=_Untitled)
    degrees = schema["$defs"][ParallelDegrees.__name__]
    degrees["description"] = (ParallelDegrees.__doc__ or "").partition("\n")[0]  # pydantic takes all of a dataclass's
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}
