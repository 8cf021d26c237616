"""The keys of a deployment file, as its schema has them.

A section of a deployment file comes in; its keys go out, each with its own type. `deploy.overrides` looks up variables
and flags in them; `deploy.load` suggests the nearest key for a misspelled one.
"""

import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec
from deploy.yaml_text import KeyPath


def section_keys(kind: Any) -> dict[str, Any]:
    """The keys of a section with their types; empty for a type that is not a section."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if is_dataclass(kind):
        return {field.name: field.type for field in fields(kind)}
    return {}


def keys_at(path: KeyPath) -> list[str]:
    """The keys that the section at `path` may have."""
    kind: Any = DeploymentSpec
    for part in path:
        if isinstance(part, str):
            kind = section_keys(kind).get(part)
        else:
            kind = next((item for alternative in _alternatives(kind) for item in _items(alternative)), None)
    return list(section_keys(kind))


def takes_text(kind: Any) -> bool:
    """Whether every text is a value of this type."""
    return str in _alternatives(kind)


def has_free_keys(kind: Any) -> bool:
    """Whether the operator chooses the keys, such as for environment variables and node labels."""
    return get_origin(kind) is dict


def children(kind: Any, raw: Any) -> Iterator[tuple[str, str | int, Any, Any]]:
    """The content of a section or a list, as (name, key, type, value or None).

    Args:
        kind: the type in the schema.
        raw: the value so far, which may break the schema. A model in a list is called by its name; any item is called
            by its index, unless a model has that name.
    """
    for name, inner in section_keys(kind).items():
        yield name, name, inner, raw.get(name) if isinstance(raw, dict) else None
    if not isinstance(raw, list):
        return
    for inner in (item for alternative in _alternatives(kind) for item in _items(alternative)):
        names = [item.get("name") if inner is ModelSpec and isinstance(item, dict) else None for item in raw]
        for index, (called, item) in enumerate(zip(names, raw, strict=True)):
            if isinstance(called, str):
                yield called, index, inner, item
            if str(index) not in names:
                yield str(index), index, inner, item


def _items(kind: Any) -> list[Any]:
    return [get_args(kind)[0]] if get_origin(kind) is tuple else []


def _alternatives(kind: Any) -> list[Any]:
    """The types of a union, or the type itself."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [one for part in get_args(kind) for one in _alternatives(part)]
    return [kind]
