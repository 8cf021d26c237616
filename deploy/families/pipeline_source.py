"""What the source of a diffusers pipeline says of its call. It is read, not imported: that would bring torch.

The class name of a pipeline comes in; a `ClassicCall` goes out. Called by `deploy.families.classic`; the adapter of
classic pipelines asks it as well, so that both know the same.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALARS = ("int", "float", "str", "bool")


@dataclass(frozen=True)
class ClassicCall:
    """The call of a pipeline.

    Attributes:
        parameters: of `__call__`, without `self`.
        scalars: those that take one number, text or switch, each with its type: int, float, str or bool.
        required: those without a default.
        components: what `__init__` must be given.
        guided_above: the guidance scale above which it evaluates a second branch; None: it compares none.
        batches_branches: it puts both branches into one forward.
        changes_attention: it exchanges attention processors.
        encodes: it has a method that encodes prompts.
        shows_progress: it opens a progress bar where its loop begins.
    """

    parameters: tuple[str, ...]
    scalars: Mapping[str, str]
    required: tuple[str, ...]
    components: tuple[str, ...]
    guided_above: float | None
    batches_branches: bool
    changes_attention: bool
    encodes: bool
    shows_progress: bool


@functools.cache
def classic_call(pipeline: str) -> ClassicCall | None:
    """The call of a pipeline by its class name; None: diffusers has no such class, or it inherits its call."""
    found = next(_classes(pipeline), None)
    methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)} if found else {}
    if found is None or not {"__call__", "__init__"} <= methods.keys():
        return None
    call, defaults = methods["__call__"].args, len(methods["__call__"].args.defaults)
    names = tuple(argument.arg for argument in call.args[1:])
    return ClassicCall(
        parameters=(*names, *(argument.arg for argument in call.kwonlyargs)),
        scalars={n: kind for n, kind in map(_scalar, (*call.args[1:], *call.kwonlyargs)) if kind},
        required=names[: len(names) - defaults],
        components=_without_default(methods["__init__"].args),
        guided_above=next(_thresholds(found), None),
        batches_branches=any(_doubles(node) for node in ast.walk(methods["__call__"])),
        changes_attention=any("attn_proc" in getattr(node, "attr", "") for node in ast.walk(methods["__call__"])),
        encodes="encode_prompt" in methods,
        shows_progress=any(_is_attribute(node, "progress_bar") for node in ast.walk(methods["__call__"])),
    )


def _classes(name: str) -> Iterator[ast.ClassDef]:
    """The definitions of a class of diffusers' pipelines. Only files that have it are parsed."""
    spec = importlib.util.find_spec("diffusers")  # does not import it
    defines = re.compile(rf"^class {re.escape(name)}\(", re.MULTILINE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place, "pipelines").rglob("*.py")):
            source = file.read_text(encoding="utf-8")
            if defines.search(source):
                yield from (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)


def _without_default(arguments: ast.arguments) -> tuple[str, ...]:
    names = [argument.arg for argument in arguments.args[1:]]
    return tuple(names[: len(names) - len(arguments.defaults)])


def _scalar(argument: ast.arg) -> tuple[str, str]:
    """A parameter and its type; no type if it takes none of `SCALARS`, or several. It may take lists of one as well."""
    parts = ast.unparse(argument.annotation).split(" | ") if argument.annotation else []
    kinds = [part for part in parts if part != "None" and not part.startswith("list[")]
    return argument.arg, kinds[0] if len(kinds) == 1 and kinds[0] in SCALARS else ""


def _thresholds(kind: ast.ClassDef) -> Iterator[float]:
    """The numbers of comparisons such as `self._guidance_scale > 1`."""
    for node in ast.walk(kind):
        if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], ast.Gt):
            continue
        value: Any = getattr(node.comparators[0], "value", None)
        name = getattr(node.left, "attr", getattr(node.left, "id", ""))
        if name in ("guidance_scale", "_guidance_scale") and isinstance(value, int | float):
            yield float(value)


def _doubles(node: ast.AST) -> bool:
    """Whether this is `torch.cat([latents] * 2)`."""
    if not isinstance(node, ast.Call) or not _is_attribute(node.func, "cat") or not node.args:
        return False
    times = node.args[0]
    return isinstance(times, ast.BinOp) and isinstance(times.op, ast.Mult) and isinstance(times.left, ast.List)


def _is_attribute(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == name
