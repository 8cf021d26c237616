"""Reads a deployment file: YAML in, `DeploymentSpec` out, or a `SpecError` with one line per mistake."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deploy.spec import DeploymentSpec, ModelSpec, SpecError


def load_spec(path: Path) -> DeploymentSpec:
    """Read a deployment file; relative model folders are taken from the file's own folder.

    Raises:
        SpecError: the file cannot be read, is not YAML, or breaks the schema.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: expected a mapping with the key 'models', got {type(raw).__name__}")
    try:
        spec = DeploymentSpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError("\n".join(f"{path}: {_explain(mistake)}" for mistake in error.errors())) from None
    folder = path.resolve().parent
    return spec.model_copy(update={"models": tuple(_beside(folder, model) for model in spec.models)})


def _beside(folder: Path, model: ModelSpec) -> ModelSpec:
    """The model with whole paths; a hub id stays one."""

    def whole(source: str) -> str:
        return str((folder / source).resolve())

    loras = tuple(lora.model_copy(update={"source": whole(lora.source)}) for lora in model.loras)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model.source) and not (folder / model.source).exists()
    source = model.source if is_hub_id else whole(model.source)
    return model.model_copy(update={"source": source, "loras": loras})


def _explain(mistake: Any) -> str:
    where = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *parents, key = mistake["loc"]
        allowed = _keys_at(parents)
        close = difflib.get_close_matches(str(key), allowed, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
        return f"{where}: unknown key; {hint}"
    message = mistake["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" + (f", got {mistake['input']!r}" if isinstance(mistake["input"], str | int) else "")


def _keys_at(parents: list[str | int]) -> list[str]:
    """The keys that the schema allows inside the section at `parents`."""
    section: Any = DeploymentSpec
    for part in parents:
        if part == "models":
            section = ModelSpec
        elif isinstance(part, str):
            section = section.model_fields[part].annotation
    fields = getattr(section, "model_fields", None) or section.__dataclass_fields__
    return list(fields)
