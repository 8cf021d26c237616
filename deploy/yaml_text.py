"""Reads YAML more strictly than PyYAML and remembers lines; writes it without anchors.

Text comes in; values go out with the line of each key, or a `YamlMistake` that names the line. `deploy.load` reads
files with it, `deploy.overrides` the values of variables and flags; `spray build` writes with it.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.reader import ReaderError

KeyPath = tuple[str | int, ...]
"""The place of a value in a deployment: keys of mappings, indices of lists."""


MOST_NODES = 100_000
"""Keys, values, mappings and lists of a deployment, each alias with a copy of its own."""

NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-f]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan",
}
"""Numbers that mean the same in YAML 1.1, which PyYAML reads, and in YAML 1.2."""


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
        YamlMistake: the text is not YAML, repeats a key in one mapping, has a number that YAML 1.2 reads differently,
            an anchor that contains itself, or aliases that expand to too many values.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None, {}
        _refuse_ambiguities(root, {})
        value = loader.construct_document(root)  # which also resolves merge keys (<<) in the nodes
    except YamlMistake:
        raise
    except ReaderError as error:
        found = f"the character {chr(error.character)!r} is not allowed"
        raise YamlMistake(text.count("\n", 0, error.position) + 1, f"is not YAML: {found}") from None
    except yaml.MarkedYAMLError as error:
        raise _located(error) from None
    except RecursionError:
        raise YamlMistake(1, "is nested too deeply") from None
    except ValueError as error:  # a date that does not exist
        raise YamlMistake(1, f"has a value that cannot be: {error}; put it in quotes") from None
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


def _refuse_ambiguities(node: yaml.Node, seen: dict[int, int]) -> int:
    """Look at each node once, however many aliases it has.

    Args:
        node: with all that it contains.
        seen: by the nodes' identities, how many nodes each stands for; 0 while it is looked at.

    Returns:
        How many nodes it stands for, with a copy for each alias.
    """
    line = node.start_mark.line + 1
    if id(node) in seen:
        if not seen[id(node)]:
            raise YamlMistake(line, "an anchor must not contain itself")
        return seen[id(node)]
    seen[id(node)] = 0
    if isinstance(node, yaml.ScalarNode):
        _refuse_old_numbers(node)
        inside: list[yaml.Node] = []
    elif isinstance(node, yaml.MappingNode):
        _refuse_duplicates(node)
        inside = [part for pair in node.value for part in pair]
    else:
        inside = list(node.value)
    total = 1 + sum(_refuse_ambiguities(part, seen) for part in inside)
    if total > MOST_NODES:
        raise YamlMistake(line, f"aliases make this more than {MOST_NODES} values; write out what is meant")
    seen[id(node)] = total
    return total


def _refuse_old_numbers(node: yaml.ScalarNode) -> None:
    """Reject numbers that YAML 1.1 and YAML 1.2 read differently: `010`, `1_000`, `1:30`, `0b1`."""
    kind = node.tag.rpartition(":")[2]
    if kind in NUMBERS and not re.fullmatch(NUMBERS[kind], node.value, re.IGNORECASE):
        raise YamlMistake(
            node.start_mark.line + 1,
            f"{node.value} is another value in YAML 1.1 than in 1.2; write a plain number, or put it in quotes",
        )


def _refuse_duplicates(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                raise YamlMistake(line, f"{key.value!r} is repeated; it is first in line {first}; keep one")
            lines[key.tag, key.value] = line


def _lines(node: yaml.Node, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:  # merged keys come first, so a mapping's own key wins
            yield (*path, key.value), key.start_mark.line + 1
            yield from _lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value.start_mark.line + 1
            yield from _lines(value, (*path, index))
