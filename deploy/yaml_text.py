"""Reads YAML more strictly than PyYAML and remembers lines; writes it without anchors.

Text comes in; values go out with the line of each key, or a `YamlMistake` that names the line. `deploy.load` reads
files with it, `deploy.overrides` the values of variables and flags; `spray build` writes with it.
"""

from collections.abc import Iterator
from typing import Any

import yaml
from yaml.reader import ReaderError

KeyPath = tuple[str | int, ...]
"""The place of a value in a deployment: keys of mappings, indices of lists."""


class YamlMistake(ValueError):
    """Text that is not YAML, or repeats a key.

    Attributes:
        line: of the mistake, counted from 1.
    """

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """The value of a text, and the line of every key and list item in it.

    Raises:
        YamlMistake: the text is not YAML, repeats a key in one mapping, or has an anchor that contains itself.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None, {}
        _refuse_duplicates(root, ())
        value = loader.construct_document(root)  # which also resolves merge keys (<<) in the nodes
    except ReaderError as error:
        found = f"the character {chr(error.character)!r} is not allowed"
        raise YamlMistake(text.count("\n", 0, error.position) + 1, f"is not YAML: {found}") from None
    except yaml.MarkedYAMLError as error:
        raise _located(error) from None
    except RecursionError:
        raise YamlMistake(1, "is nested too deeply") from None
    return _unshared(value), dict(_lines(root, ()))


def to_yaml(value: Any) -> str:
    """Plain values as text without anchors; keys stay in order."""
    text: str = yaml.safe_dump(_unshared(value), sort_keys=False)
    return text


def _unshared(value: Any) -> Any:
    """A copy in which each alias has a value of its own, so that one can change without the others."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _located(error: yaml.MarkedYAMLError) -> YamlMistake:
    begun, found = error.context_mark, error.problem_mark
    line = found.line + 1 if found else 1
    doing = error.context or ""
    if doing.startswith("while") and begun and begun.line + 1 != line:
        doing += f" that begins in line {begun.line + 1}"
    hint = "; indent with spaces, not with tabs" if "'\\t'" in str(error.problem) else ""
    return YamlMistake(line, f"is not YAML: {doing}{', ' if doing else ''}{error.problem}{hint}")


def _refuse_duplicates(node: yaml.Node, inside: tuple[yaml.Node, ...]) -> None:
    if any(node is outer for outer in inside):
        raise YamlMistake(node.start_mark.line + 1, "an anchor must not contain itself")
    if isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in lines:
                    first = lines[key.tag, key.value]
                    raise YamlMistake(line, f"{key.value!r} is repeated; it is first in line {first}; keep one")
                lines[key.tag, key.value] = line
            _refuse_duplicates(value, (*inside, node))
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(value, (*inside, node))


def _lines(node: yaml.Node, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:  # merged keys come first, so a mapping's own key wins
            yield (*path, key.value), key.start_mark.line + 1
            yield from _lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value.start_mark.line + 1
            yield from _lines(value, (*path, index))
