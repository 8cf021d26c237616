"""Reads a deployment: a YAML file, `SPRAY_*` variables and flags in, `DeploymentSpec` out.

Precedence, lowest first: default, file, environment, command line. Called by the command line, the demo and the tests.
A mistake is a line of a `SpecError` and says where the value came from.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploy.keys import keys_at, section_keys
from deploy.model_spec import ModelSpec
from deploy.overrides import Overrides, dotted
from deploy.spec import DeploymentSpec, SpecError
from deploy.storage_spec import ABSOLUTE
from deploy.yaml_text import KeyPath, YamlMistake, parse_yaml

NO_ENVIRONMENT: Mapping[str, str] = {}
ALIGNED_UP_TO = 88
"""Characters of a value. The origins of longer values are not aligned."""


@dataclass(frozen=True)
class LoadedSpec:
    """A deployment, and where each of its values comes from.

    Attributes:
        spec: the deployment.
        origins: by the dotted path of each single value, such as `models.demo.parallel.ulysses_degree`:
            `file deploy/local.yaml:8`, a variable's name, `--set`, or `default`.
    """

    spec: DeploymentSpec
    origins: Mapping[str, str]


def load_spec(path: Path, environ: Mapping[str, str] = NO_ENVIRONMENT, overrides: Sequence[str] = ()) -> DeploymentSpec:
    """Read a deployment. Relative paths start at the file's folder.

    Args:
        path: the YAML file.
        environ: its `SPRAY_*` variables override the file; `deploy.overrides` says how they are spelled.
        overrides: `PATH=VALUE`, such as `models.qwen-image.parallel.ulysses_degree=4`; they override everything else.

    Raises:
        SpecError: the file is not readable YAML, or a value breaks the schema.
    """
    return load_with_origins(path, environ, overrides).spec


def load_with_origins(
    path: Path, environ: Mapping[str, str] = NO_ENVIRONMENT, overrides: Sequence[str] = ()
) -> LoadedSpec:
    """Like `load_spec`, with the origin of each value.

    Raises:
        SpecError: see `load_spec`.
    """
    overridden = _read(path)
    overridden.add_environment(environ)
    overridden.add_flags(overrides)
    mistakes = overridden.mistakes
    try:
        spec = DeploymentSpec.model_validate(overridden.raw)
    except ValidationError as error:
        mistakes += [_explain(mistake, overridden.origins) for mistake in error.errors()]
    if mistakes:
        raise SpecError("\n".join(mistakes))
    folder = path.resolve().parent
    spec = spec.model_copy(update={"models": tuple(_beside(folder, model) for model in spec.models)})
    if spec.auth.api_keys_file:
        file = str(folder / spec.auth.api_keys_file)
        spec = spec.model_copy(update={"auth": spec.auth.model_copy(update={"api_keys_file": file})})
    origins = {name: overridden.origins.get(at, "default") for at, name, _ in _values(spec)}
    return LoadedSpec(spec, origins)


def print_config(loaded: LoadedSpec) -> list[str]:
    """Every value of a deployment as `PATH = VALUE  # ORIGIN`; passwords and the like are not shown."""
    lines = [(f"{name} = {_shown(at, value)}", loaded.origins[name]) for at, name, value in _values(loaded.spec)]
    width = max(len(line) for line, _ in lines if len(line) <= ALIGNED_UP_TO)
    return [f"{line:<{width}}  # {origin}" for line, origin in lines]


def _read(path: Path) -> Overrides:
    try:
        raw, lines = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: is not YAML: {error}") from None
    except YamlMistake as mistake:
        raise SpecError(f"{path}:{mistake.line}: {mistake}") from None
    if not isinstance(raw, dict):
        got = "nothing" if raw is None else type(raw).__name__
        raise SpecError(f"{path}: expected a mapping with the key 'models', got {got}")
    return Overrides(raw, {(): f"file {path}"} | {key: f"file {path}:{line}" for key, line in lines.items()})


def _beside(folder: Path, model: ModelSpec) -> ModelSpec:
    """The model with absolute paths. A hub id stays as it is."""

    def absolute(source: str) -> str:
        return str((folder / source).resolve())

    loras = tuple(lora.model_copy(update={"source": absolute(lora.source)}) for lora in model.loras)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model.source) and not (folder / model.source).exists()
    source = model.source if is_hub_id else absolute(model.source)
    return model.model_copy(update={"source": source, "loras": loras})


def _explain(mistake: Any, origins: Mapping[KeyPath, str]) -> str:
    path: KeyPath = mistake["loc"]
    message = _message(mistake)
    nearest = next(path[:depth] for depth in range(len(path), -1, -1) if path[:depth] in origins)
    # A rule between several values reports the section; the values that its message names may come from elsewhere.
    within = [key for key in origins if len(key) > len(path) and key[: len(path)] == path and str(key[-1]) in message]
    single = [key for key in within if not any(key == other[: len(key)] for other in within if other != key)]
    others = [f"{dotted(key)} is from {origins[key]}" for key in single if not origins[key].startswith("file ")]
    said = ": ".join(part for part in (origins[nearest].removeprefix("file "), dotted(path), message) if part)
    return f"{said} ({', '.join(others)})" if others else said


def _message(mistake: Any) -> str:
    if mistake["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *parents, key = mistake["loc"]
        allowed = keys_at(tuple(parents))
        close = difflib.get_close_matches(str(key), allowed, n=1)
        return "unknown key; " + (f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}")
    message = str(mistake["msg"]).removeprefix("Value error, ")
    if mistake["type"] == "string_pattern_mismatch" and mistake["ctx"]["pattern"] == ABSOLUTE:
        message = "must be an absolute path"
    given = mistake["input"]
    if isinstance(given, str | int | float):
        message += f", got {given!r}"
    elif given is None:
        message += ", got nothing"
    return message + ("; put it in quotes" if mistake["type"] == "string_type" and given is not None else "")


def _values(spec: DeploymentSpec) -> list[tuple[KeyPath, str, Any]]:
    """Every value as (path, path with models by name, value); an empty list or mapping counts as a value."""

    def inside(value: Any, at: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
        items: list[tuple[str | int, Any]]
        if keys := section_keys(type(value)):
            items = [(key, getattr(value, key)) for key in keys]
        elif isinstance(value, dict) and value:
            items = list(value.items())
        elif isinstance(value, tuple) and any(section_keys(type(item)) for item in value):
            items = list(enumerate(value))
        else:
            yield at, value
            return
        for key, item in items:
            yield from inside(item, (*at, key))

    def name(at: KeyPath) -> str:
        return dotted(("models", spec.models[int(at[1])].name, *at[2:])) if at[0] == "models" else dotted(at)

    return [(at, name(at), value) for at, value in inside(spec, ())]


def _shown(at: KeyPath, value: Any) -> str:
    is_secret = "env" in at and re.search("token|key|secret|password", str(at[-1]), re.IGNORECASE)
    return '"***"' if is_secret else json.dumps(value, ensure_ascii=False)
