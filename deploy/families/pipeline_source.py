"""What the source of a diffusers pipeline says of its call. It is read, not imported: that would bring torch.

The class name of a pipeline comes in; a `ClassicCall` goes out. Called by `deploy.families.classic`; the adapter of
classic pipelines asks it as well, so that both know the same.
"""

import ast
import functools
import importlib.util
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.model_folder import GUARDRAIL

SCALARS = ("int", "float", "str", "bool")

OF_TWO_STEPS = ("SCMScheduler",)
"""Of pipelines that say where the second of two steps begins, whatever their constructor says: no other takes that."""

LATENT_DIMENSIONS = 4
"""Of pictures: samples, channels, rows, columns."""


@dataclass(frozen=True)
class ClassicCall:
    """The call of a pipeline.

    Attributes:
        parameters: of `__call__`, without `self`.
        scalars: those that take one number, text or switch, each with its type: int, float, str or bool.
        required: those without a default.
        components: what `__init__` must be given.
        parts: all that it takes.
        guided_above: the guidance scale above which it evaluates a second branch; None: it compares none.
        batches_branches: it puts both branches into one forward.
        changes_attention: it exchanges attention processors.
        encodes: it has a method that encodes prompts.
        schedulers: classes of schedulers that `__init__` says it takes.
        shows_progress: it opens a progress bar where its loop begins.
        takes_strength: its `strength` is one number: the share of the steps that are done.
        takes_several: its `image` may be several pictures, or its `images` are, of which it makes one.
        sized_by_image: what it makes has the size or shape of its `image`, whatever its height and width say.
        may_lack: parameters of which it asks whether they are given, and can do without.
        prompts_are_json: its check of inputs takes prompts that are JSON with an `edit_instruction`, and no others.
        scale: the parameter that weighs its second branch.
        gives_sigmas: it tells the scheduler the noise of each step; only some schedulers take that.
        makes_one: it makes one at a time, however many it is asked for.
        one_generator: it draws by one generator, and not by a list of them.
        counts_frames: its `num_frames` says how many frames it makes; else a clip that it is given does.
        fixed_frames: how many it makes, whatever it is told; 0: as it is told.
        latent_window: it makes frames of so many latents at a time, each in a loop of its own; 0: all in one loop.
        frame_window: it makes so many frames at a time, each in a loop of its own that begins with the last frames of
            the one before; 0: it does not.
        least_latents: of frames, without which it makes nothing: it normalizes the first ones by those behind them.
        pixels: its check of inputs wants sizes of a multiple of so many pixels.
        patches: its check of inputs wants sizes of a multiple of so many patches of the transformer.
        caches_pictures: it keeps what the transformer computes of its pictures in a cache.
        packages: without which its license lets nobody run it.
    """

    parameters: tuple[str, ...]
    scalars: Mapping[str, str]
    required: tuple[str, ...]
    components: tuple[str, ...]
    parts: tuple[str, ...]
    guided_above: float | None
    batches_branches: bool
    changes_attention: bool
    encodes: bool
    schedulers: tuple[str, ...]
    shows_progress: bool
    takes_strength: bool
    takes_several: bool
    sized_by_image: bool
    may_lack: frozenset[str]
    prompts_are_json: bool
    scale: str
    gives_sigmas: bool
    makes_one: bool
    one_generator: bool
    counts_frames: bool
    fixed_frames: int
    latent_window: int
    frame_window: int
    least_latents: int
    pixels: int
    patches: int
    caches_pictures: bool
    packages: tuple[str, ...]


@functools.cache
def classic_call(pipeline: str) -> ClassicCall | None:
    """The call of a pipeline by its class name; None: diffusers has no such class, or it inherits its call."""
    found = next(_classes(pipeline), None)
    methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)} if found else {}
    if found is None or not {"__call__", "__init__"} <= methods.keys():
        return None
    call, defaults = methods["__call__"].args, len(methods["__call__"].args.defaults)
    names = tuple(argument.arg for argument in call.args[1:])
    set_to = dict(zip(names[len(names) - defaults :], call.defaults, strict=True))
    unset = {name for name, default in set_to.items() if _is_none(default)}
    scale = "true_cfg_scale" if "true_cfg_scale" in set_to and _guides(set_to) else "guidance_scale"
    return ClassicCall(
        parameters=(*names, *(argument.arg for argument in call.kwonlyargs)),
        scalars={n: kind for n, kind in map(_scalar, (*call.args[1:], *call.kwonlyargs)) if kind},
        required=names[: len(names) - defaults],
        components=_without_default(methods["__init__"].args),
        parts=tuple(argument.arg for argument in methods["__init__"].args.args[1:]),
        guided_above=next(_thresholds(methods, scale), None),
        batches_branches=any(_doubles(node) for node in ast.walk(methods["__call__"])),
        changes_attention=any("attn_proc" in getattr(node, "attr", "") for node in ast.walk(methods["__call__"])),
        encodes=any(name.startswith("encode_prompt") for name in methods),
        schedulers=OF_TWO_STEPS if "intermediate_timesteps" in names else _schedulers(methods["__init__"].args),
        shows_progress=any(_is_attribute(node, "progress_bar") for node in ast.walk(methods["__call__"])),
        takes_strength=any(a.arg == "strength" and _one_number(a) for a in call.args),
        takes_several=any(
            _goes_through(node, name) for name in ("image", "images") for node in ast.walk(methods["__call__"])
        ),
        sized_by_image=any(_takes_size_of_image(node, "height" in names) for node in ast.walk(methods["__call__"])),
        may_lack=frozenset(
            name
            for name in unset
            if any(leaves(methods, name) for leaves in (_may_lack, _left_to_a_method, _checked_if_given))
        ),
        prompts_are_json=any(_calls(node, "is_valid_edit_json") for m in methods.values() for node in ast.walk(m)),
        scale=scale,
        gives_sigmas=any(_is_name(node, "sigmas") for node in ast.walk(methods["__call__"])),
        pixels=max((_pixels(node) for node in ast.walk(methods.get("check_inputs", methods["__call__"]))), default=1),
        patches=max((_patches(node) for node in ast.walk(methods.get("check_inputs", methods["__call__"]))), default=1),
        caches_pictures=any(_is_attribute(node, "set_mode") for node in ast.walk(methods["__call__"])),
        packages=(GUARDRAIL,) if "CosmosSafetyChecker" in ast.unparse(methods["__init__"].args) else (),
        **_of_clips(methods),
    )


@functools.cache
def transformer_pipelines() -> Mapping[str, str]:
    """All pipelines of diffusers that are built of a transformer, each with the class of that, in order of names."""
    found: dict[str, str] = {}
    for source in (each for each in _sources() if "transformer:" in each):
        for kind in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
            made = (node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
            for argument in (argument for init in made for argument in init.args.args):
                if argument.arg == "transformer" and argument.annotation and "Pipeline" in kind.name:
                    found[kind.name] = ast.unparse(argument.annotation).removesuffix(" | None")
    return dict(sorted(found.items()))


def _classes(name: str) -> Iterator[ast.ClassDef]:
    """The definitions of a class of diffusers' pipelines. Only files that have it are parsed."""
    defines = re.compile(rf"^class {re.escape(name)}\(", re.MULTILINE)
    for source in _sources():
        if defines.search(source):
            yield from (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)


def _sources() -> Iterator[str]:
    """The files of diffusers' pipelines."""
    spec = importlib.util.find_spec("diffusers")  # does not import it
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place, "pipelines").rglob("*.py")):
            yield file.read_text(encoding="utf-8")


def _without_default(arguments: ast.arguments) -> tuple[str, ...]:
    names = [argument.arg for argument in arguments.args[1:]]
    return tuple(names[: len(names) - len(arguments.defaults)])


def _scalar(argument: ast.arg) -> tuple[str, str]:
    """A parameter and its type; no type if it takes none of `SCALARS`, or several. It may take lists of one as well."""
    parts = ast.unparse(argument.annotation).split(" | ") if argument.annotation else []
    kinds = [part for part in parts if part != "None" and not part.startswith("list[")]
    return argument.arg, kinds[0] if len(kinds) == 1 and kinds[0] in SCALARS else ""


def _pixels(node: ast.AST) -> int:
    """The number in `height % 32`; 1: this is something else."""
    is_remainder = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and _is_name(node.left, "height")
    value = getattr(node.right, "value", 1) if isinstance(node, ast.BinOp) and is_remainder else 1
    return value if isinstance(value, int) else 1


def _patches(node: ast.AST) -> int:
    """The number in `height % (... * patch_size * 2)`; 1: this is something else."""
    is_remainder = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and _is_name(node.left, "height")
    found = re.search(r"patch_size \* (\d+)", ast.unparse(node)) if is_remainder else None
    return int(found[1]) if found else 1


def _thresholds(methods: Mapping[str, ast.FunctionDef], scale: str) -> Iterator[float]:
    """The numbers of comparisons such as `self._guidance_scale > 1`."""
    for node in (n for name, method in methods.items() if name != "check_inputs" for n in ast.walk(method)):
        if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], ast.Gt):
            continue
        value: Any = getattr(node.comparators[0], "value", None)
        name = getattr(node.left, "attr", getattr(node.left, "id", ""))
        if name in (scale, f"_{scale}") and isinstance(value, int | float):
            yield float(value)


def _doubles(node: ast.AST) -> bool:
    """Whether this is `torch.cat([latents] * 2)`, `torch.cat([latents, latents])` or `latents.repeat(2, 1, 1, 1)`."""
    if not isinstance(node, ast.Call) or not node.args:
        return False
    times = node.args[0]
    if _is_attribute(node.func, "repeat"):
        return isinstance(times, ast.Constant) and times.value == 2 and len(node.args) == LATENT_DIMENSIONS
    if not _is_attribute(node.func, "cat"):
        return False
    if ast.unparse(times) == "[latents, latents]":
        return True
    return isinstance(times, ast.BinOp) and isinstance(times.op, ast.Mult) and isinstance(times.left, ast.List)


def _takes_size_of_image(node: ast.AST, is_told: bool) -> bool:
    """Whether this is `preprocess(image)`, which keeps the picture's size, or `height = image_height` or the like.

    Args:
        node: a part of the call.
        is_told: the call has a height. If not, `calculate_dimensions(...)` is what decides.
    """
    if isinstance(node, ast.Assign):
        known = any(_is_name(node.value, name) for name in ("image_height", "calculated_height"))
        return known and _is_name(node.targets[0], "height")
    if _calls(node, "calculate_dimensions"):
        return not is_told
    if not isinstance(node, ast.Call) or not _is_attribute(node.func, "preprocess") or node.keywords:
        return False
    return len(node.args) == 1 and _is_name(node.args[0], "image")


def _guides(set_to: Mapping[str, ast.expr]) -> bool:
    """Whether `true_cfg_scale` is what weighs the second branch, by the defaults: else it is there, but off."""
    value: Any = getattr(set_to["true_cfg_scale"], "value", None)
    scale = set_to.get("guidance_scale")
    return (scale is not None and _is_none(scale)) or (isinstance(value, int | float) and value > 1)


def _of_clips(methods: Mapping[str, ast.FunctionDef]) -> dict[str, Any]:
    """What it does with clips and frames, as the fields of `ClassicCall`."""
    call = methods["__call__"]
    told = any(argument.arg == "num_frames" for argument in call.args.args)
    defaults = dict(_defaults(call))
    windows = [defaults.get("latent_window_size"), defaults.get("base_num_frames")]
    latents, frames = (value if isinstance(value, int) else 0 for value in windows)
    one_generator = any(_refuses_generators(node) for method in methods.values() for node in ast.walk(method))
    first = methods.get("normalize_first_frame")
    told_one = any(ast.unparse(part) == "num_videos_per_prompt = 1" for part in call.body)
    told_one = told_one or "view(1).repeat(2)" in ast.unparse(call)  # a timestep for each branch of one sample
    return {
        "makes_one": one_generator or told_one or bool(frames),  # one by one: the transformer may take one only
        "one_generator": one_generator,
        "counts_frames": told and any(_hands_on(node, "num_frames") for node in ast.walk(call)),
        "fixed_frames": next((n for n in map(_fixes_frames, ast.walk(call)) if n), 0),
        "latent_window": latents,
        "frame_window": frames,
        "least_latents": next((n + 1 for n in map(_first_frames, ast.walk(first)) if n), 1) if first else 1,
    }


def _first_frames(node: ast.AST) -> int:
    """The number in `nFr = 4`; 0: this is something else."""
    number: Any = getattr(node.value, "value", None) if isinstance(node, ast.Assign) and _sets(node, "nFr") else 0
    return number if isinstance(number, int) else 0


def _defaults(function: ast.FunctionDef) -> Iterator[tuple[str, Any]]:
    """The parameters whose defaults are written as constants, each with its own."""
    arguments = function.args.args[len(function.args.args) - len(function.args.defaults) :]
    for argument, default in zip(arguments, function.args.defaults, strict=True):
        if isinstance(default, ast.Constant):
            yield argument.arg, default.value


def _refuses_generators(node: ast.AST) -> bool:
    """Whether this is `if isinstance(generator, list): raise`."""
    if not isinstance(node, ast.If) or ast.unparse(node.test) != "isinstance(generator, list)":
        return False
    return isinstance(node.body[0], ast.Raise)


def _hands_on(node: ast.AST, name: str) -> bool:
    """Whether this gives a parameter to a method."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return any(_is_name(value, name) for value in (*node.args, *(each.value for each in node.keywords)))


def _fixes_frames(node: ast.AST) -> int:
    """The number in `num_frames = 5 if ... else num_frames`; 0: this is something else."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.IfExp):
        return 0
    number: Any = getattr(node.value.body, "value", None)
    return number if isinstance(number, int) and _sets(node, "num_frames") else 0


def _left_to_a_method(methods: Mapping[str, ast.FunctionDef], name: str) -> bool:
    """Whether the call reads nothing of a parameter, but gives it to a method that has something else to do without."""
    call = methods["__call__"]
    as_given = itertools.takewhile(lambda part: not _sets(part, name), call.body)
    nodes = [node for part in as_given for node in ast.walk(part)]
    if any(_reads(node, name) for node in nodes):
        return False
    able = any(_does_without(methods[each], name) for each in methods.keys() - {"__call__", "check_inputs"})
    return able and any(_hands_on(node, name) for node in ast.walk(call))


def _checked_if_given(methods: Mapping[str, ast.FunctionDef], name: str) -> bool:
    """Whether the call reads nothing of a parameter, which its check of inputs looks at only where it is given."""
    call, check = methods["__call__"], methods.get("check_inputs")
    if check is None or any(_reads(node, name) for node in ast.walk(call)):
        return False
    tests = [ast.unparse(node.test) for node in ast.walk(check) if isinstance(node, ast.If)]
    return f"{name} is not None" in tests and not any(f"{name} is None" in test for test in tests)


def _reads(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute | ast.Subscript) and _is_name(node.value, name)


def _sets(node: ast.stmt, name: str) -> bool:
    """Whether this gives a name another value."""
    goals = node.targets if isinstance(node, ast.Assign) else []
    return any(_is_name(each, name) for goal in goals for each in ast.walk(goal))


def _does_without(method: ast.FunctionDef, name: str) -> bool:
    """Whether a method has an optional parameter, and something else to do where it is not given."""
    optional = any(found == name and value is None for found, value in _defaults(method))
    asks = (ast.unparse(n.test) for n in ast.walk(method) if isinstance(n, ast.If) and n.orelse)
    return optional and any(each.startswith((f"{name} is not None", f"{name} is None")) for each in asks)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _one_number(argument: ast.arg) -> bool:
    return argument.annotation is not None and ast.unparse(argument.annotation) == "float"


def _goes_through(node: ast.AST, name: str) -> bool:
    """Whether this is `for each in name:`, or `if isinstance(name, PIL.Image.Image): ...`, which makes a list of it."""
    if isinstance(node, ast.If):
        return ast.unparse(node).startswith(f"if isinstance({name}, PIL.Image.Image):\n    {name} = [{name}]")
    return isinstance(node, ast.For) and _is_name(node.iter, name)


def _may_lack(methods: Mapping[str, ast.FunctionDef], name: str) -> bool:
    """Whether the call asks if a parameter is given, and reads nothing of it where it does not ask, or is told no."""
    call = methods["__call__"]
    asks = any(_asks_for(node, name) for node in ast.walk(call))
    always = [node for part in call.body if not isinstance(part, ast.If) for node in ast.walk(part)]
    reads = any(_reads(node, name) for node in always)
    choices = (node for node in ast.walk(call) if isinstance(node, ast.If))
    asked = (node for node in choices if any(_asks_for(part, name) for part in ast.walk(node.test)))
    return asks and not reads and not any(_prepares(node, name) for each in asked for node in each.orelse)


def _asks_for(node: ast.AST, name: str) -> bool:
    """Whether this is `name is not None`."""
    return isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.IsNot) and _is_name(node.left, name)


def _prepares(node: ast.stmt, name: str) -> bool:
    """Whether this is `... = preprocess(name, ...)`."""
    call = getattr(node, "value", None)
    is_call = isinstance(call, ast.Call) and _is_attribute(call.func, "preprocess")
    return is_call and any(_is_name(argument, name) for argument in getattr(call, "args", []))


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and _is_name(node.func, name)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_attribute(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == name


def _schedulers(arguments: ast.arguments) -> tuple[str, ...]:
    found = next((each.annotation for each in arguments.args if each.arg == "scheduler"), None)
    return tuple(re.findall(r"\w*Schedulers?\b|SchedulerMixin", ast.unparse(found))) if found else ()
