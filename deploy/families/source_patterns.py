"""Patterns in the source of a pipeline's methods. Each function looks for one.

Nodes of a syntax tree come in; a truth value, a number or names come out. Called by `deploy.families.pipeline_source`,
which says what they mean.
"""

import ast
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

SCALARS = ("int", "float", "str", "bool")

LATENT_DIMENSIONS = 4
"""Dimensions of the latents of pictures: samples, channels, rows, columns."""


def scalar(argument: ast.arg) -> tuple[str, str]:
    """A parameter and its type; "" if it takes none of `SCALARS`, or several. It may take lists of the type as well."""
    parts = ast.unparse(argument.annotation).split(" | ") if argument.annotation else []
    kinds = [part for part in parts if part != "None" and not part.startswith("list[")]
    return argument.arg, kinds[0] if len(kinds) == 1 and kinds[0] in SCALARS else ""


def without_default(arguments: ast.arguments) -> tuple[str, ...]:
    names = [argument.arg for argument in arguments.args[1:]]
    return tuple(names[: len(names) - len(arguments.defaults)])


def schedulers(arguments: ast.arguments) -> tuple[str, ...]:
    found = next((each.annotation for each in arguments.args if each.arg == "scheduler"), None)
    return tuple(re.findall(r"\w*Schedulers?\b|SchedulerMixin", ast.unparse(found))) if found else ()


def pixels(node: ast.AST) -> int:
    """The number in `height % 32`; 1 for anything else."""
    is_remainder = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and is_name(node.left, "height")
    value = getattr(node.right, "value", 1) if isinstance(node, ast.BinOp) and is_remainder else 1
    return value if isinstance(value, int) else 1


def patches(node: ast.AST) -> int:
    """The number in `height % (... * patch_size * 2)`; 1 for anything else."""
    is_remainder = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and is_name(node.left, "height")
    found = re.search(r"patch_size \* (\d+)", ast.unparse(node)) if is_remainder else None
    return int(found[1]) if found else 1


def thresholds(methods: Mapping[str, ast.FunctionDef], scale: str) -> Iterator[float]:
    """The numbers of comparisons such as `self._guidance_scale > 1`."""
    for node in (n for name, method in methods.items() if name != "check_inputs" for n in ast.walk(method)):
        if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], ast.Gt):
            continue
        value: Any = getattr(node.comparators[0], "value", None)
        name = getattr(node.left, "attr", getattr(node.left, "id", ""))
        if name in (scale, f"_{scale}") and isinstance(value, int | float):
            yield float(value)


def doubles(node: ast.AST) -> bool:
    """Whether this is `torch.cat([latents] * 2)`, `torch.cat([latents, latents])` or `latents.repeat(2, 1, 1, 1)`."""
    if not isinstance(node, ast.Call) or not node.args:
        return False
    times = node.args[0]
    if is_attribute(node.func, "repeat"):
        return isinstance(times, ast.Constant) and times.value == 2 and len(node.args) == LATENT_DIMENSIONS
    if not is_attribute(node.func, "cat"):
        return False
    if ast.unparse(times) == "[latents, latents]":
        return True
    return isinstance(times, ast.BinOp) and isinstance(times.op, ast.Mult) and isinstance(times.left, ast.List)


def takes_size_of_image(node: ast.AST, is_told: bool) -> bool:
    """Whether this is `preprocess(image)`, which keeps the picture's size, or `height = image_height` or the like.

    Args:
        node: a part of the call.
        is_told: whether the call has a height. If not, `calculate_dimensions(...)` decides the size.
    """
    if isinstance(node, ast.Assign):
        known = any(is_name(node.value, name) for name in ("image_height", "calculated_height"))
        return known and is_name(node.targets[0], "height")
    if calls(node, "calculate_dimensions"):
        return not is_told
    if not isinstance(node, ast.Call) or not is_attribute(node.func, "preprocess") or node.keywords:
        return False
    return len(node.args) == 1 and is_name(node.args[0], "image")


def goes_through(node: ast.AST, name: str) -> bool:
    """Whether this is `for each in name:`, or `if isinstance(name, PIL.Image.Image): ...`, which makes a list of it."""
    if isinstance(node, ast.If):
        return ast.unparse(node).startswith(f"if isinstance({name}, PIL.Image.Image):\n    {name} = [{name}]")
    return isinstance(node, ast.For) and is_name(node.iter, name)


def guides(set_to: Mapping[str, ast.expr]) -> bool:
    """Whether, by the defaults, `true_cfg_scale` weighs the second branch. It may exist and be off."""
    value: Any = getattr(set_to["true_cfg_scale"], "value", None)
    scale = set_to.get("guidance_scale")
    return (scale is not None and is_none(scale)) or (isinstance(value, int | float) and value > 1)


def first_frames(node: ast.AST) -> int:
    """The number in `nFr = 4`; 0 for anything else."""
    number: Any = getattr(node.value, "value", None) if isinstance(node, ast.Assign) and _sets(node, "nFr") else 0
    return number if isinstance(number, int) else 0


def fixes_frames(node: ast.AST) -> int:
    """The number in `num_frames = 5 if ... else num_frames`; 0 for anything else."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.IfExp):
        return 0
    number: Any = getattr(node.value.body, "value", None)
    return number if isinstance(number, int) and _sets(node, "num_frames") else 0


def refuses_generators(node: ast.AST) -> bool:
    """Whether this is `if isinstance(generator, list): raise`."""
    if not isinstance(node, ast.If) or ast.unparse(node.test) != "isinstance(generator, list)":
        return False
    return isinstance(node.body[0], ast.Raise)


def draws_by_one(node: ast.AST) -> bool:
    """Whether this is `torch.randn(..., generator=generator)`, which takes no list of generators."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "torch.randn":
        return False
    return any(each.arg == "generator" and is_name(each.value, "generator") for each in node.keywords)


def hands_on(node: ast.AST, name: str) -> bool:
    """Whether this passes a parameter to a method."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return any(is_name(value, name) for value in (*node.args, *(each.value for each in node.keywords)))


def one_number(argument: ast.arg) -> bool:
    return argument.annotation is not None and ast.unparse(argument.annotation) == "float"


def may_lack(methods: Mapping[str, ast.FunctionDef], name: str) -> bool:
    """Whether the call tests if a parameter is given, and reads its attributes only if it is."""
    call = methods["__call__"]
    asks = any(_asks_for(node, name) for node in ast.walk(call))
    always = [node for part in call.body if not isinstance(part, ast.If) for node in ast.walk(part)]
    reads = any(_reads(node, name) for node in always)
    choices = (node for node in ast.walk(call) if isinstance(node, ast.If))
    asked = (node for node in choices if any(_asks_for(part, name) for part in ast.walk(node.test)))
    return asks and not reads and not any(_prepares(node, name) for each in asked for node in each.orelse)


def left_to_a_method(methods: Mapping[str, ast.FunctionDef], name: str) -> bool:
    """Whether the call only passes a parameter on, to a method that has an alternative without it."""
    call = methods["__call__"]
    as_given = itertools.takewhile(lambda part: not _sets(part, name), call.body)
    nodes = [node for part in as_given for node in ast.walk(part)]
    if any(_reads(node, name) for node in nodes):
        return False
    able = any(_does_without(methods[each], name) for each in methods.keys() - {"__call__", "check_inputs"})
    return able and any(hands_on(node, name) for node in ast.walk(call))


def checked_if_given(methods: Mapping[str, ast.FunctionDef], name: str) -> bool:
    """Whether the call reads no attributes of a parameter, and its check of inputs looks at it only if it is given."""
    call, check = methods["__call__"], methods.get("check_inputs")
    if check is None or any(_reads(node, name) for node in ast.walk(call)):
        return False
    tests = [ast.unparse(node.test) for node in ast.walk(check) if isinstance(node, ast.If)]
    return f"{name} is not None" in tests and not any(f"{name} is None" in test for test in tests)


def _does_without(method: ast.FunctionDef, name: str) -> bool:
    """Whether a method has an optional parameter, and an alternative without it."""
    optional = any(found == name and value is None for found, value in defaults(method))
    asks = (ast.unparse(n.test) for n in ast.walk(method) if isinstance(n, ast.If) and n.orelse)
    return optional and any(each.startswith((f"{name} is not None", f"{name} is None")) for each in asks)


def defaults(function: ast.FunctionDef) -> Iterator[tuple[str, Any]]:
    """The parameters whose defaults are constants, each with its default."""
    arguments = function.args.args[len(function.args.args) - len(function.args.defaults) :]
    for argument, default in zip(arguments, function.args.defaults, strict=True):
        if isinstance(default, ast.Constant):
            yield argument.arg, default.value


def _asks_for(node: ast.AST, name: str) -> bool:
    """Whether this is `name is not None`."""
    return isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.IsNot) and is_name(node.left, name)


def _prepares(node: ast.stmt, name: str) -> bool:
    """Whether this is `... = preprocess(name, ...)`."""
    call = getattr(node, "value", None)
    is_call = isinstance(call, ast.Call) and is_attribute(call.func, "preprocess")
    return is_call and any(is_name(argument, name) for argument in getattr(call, "args", []))


def _reads(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute | ast.Subscript) and is_name(node.value, name)


def _sets(node: ast.stmt, name: str) -> bool:
    """Whether this assigns a name."""
    goals = node.targets if isinstance(node, ast.Assign) else []
    return any(is_name(each, name) for goal in goals for each in ast.walk(goal))


def calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and is_name(node.func, name)


def goes_through_all(node: ast.AST, name: str) -> bool:
    """Whether this is `[... for each in name]`."""
    return isinstance(node, ast.ListComp) and any(is_name(part.iter, name) for part in node.generators)


def is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def is_attribute(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == name


def is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
