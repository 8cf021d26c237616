"""Reads what a diffusers pipeline takes and does off the source of its call, without importing it (and torch).

The class name of a pipeline comes in; a `ClassicCall` goes out. Called by `deploy.families.classic` and by the adapter
of classic pipelines, so that both know the same.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.families import source_patterns as patterns
from deploy.model_folder import GUARDRAIL

OF_TWO_STEPS = ("SCMScheduler",)
"""The only scheduler that takes `intermediate_timesteps`, for pipelines that set it, whatever `__init__` says."""

ROUNDED_DOWN = "int(num_inference_steps * strength)"
"""How some calls count the steps that `strength` leaves."""


DRAWS_TOKENS = "generate_prior_tokens"
"""A method that draws tokens by the seed of the first picture alone, for all pictures of a call."""

KEPT_CLIP = "latents[:, :context_length, ...] = video_latents"
"""How some calls put the clip back where their video begins."""


@dataclass(frozen=True)
class ClassicCall:
    """The call of a pipeline.

    Attributes:
        parameters: parameters of `__call__`, without `self`.
        scalars: parameters that take one number, text or switch, each with its type: int, float, str or bool.
        required: parameters without a default.
        components: parameters of `__init__` without a default.
        parts: all parameters of `__init__`.
        guided_above: the guidance scale above which it evaluates a second branch; None: the source compares no scale.
        batches_branches: whether it puts both branches into one forward.
        changes_attention: whether it exchanges attention processors.
        encodes: whether it has a method that encodes prompts.
        schedulers: the scheduler classes in the signature of `__init__`.
        shows_progress: whether it opens a progress bar at its loop.
        takes_strength: whether its `strength` is one number, the share of the steps to do.
        usual_strength: the default of `strength`; 0: it has none.
        rounds_steps_down: whether `strength` may leave no step at all, because what it leaves is rounded down.
        takes_several: whether its `image` may be, or its `images` are, several pictures from which it makes one.
        sized_by_image: whether the output has the size or shape of `image`, whatever height and width say.
        may_lack: optional parameters that it works without.
        needs_negative_prompt: whether a guided call fails without a negative prompt, an empty one at least.
        prompts_are_json: whether its check of inputs takes only prompts that are JSON with an `edit_instruction`.
        scale: the parameter that weighs its second branch.
        gives_sigmas: whether it passes the noise of each step to the scheduler, which only some schedulers accept.
        makes_one: whether it makes only one picture or video per call.
        one_generator: whether it takes one generator, not a list.
        counts_frames: whether `num_frames` sets the number of frames; otherwise the input clip does.
        takes_clips: whether its `video` is a list of clips, so that a list of frames would be as many clips.
        keeps_clip: whether its video begins with the clip as it is, and only what comes after it is made.
        sized_by_clip: whether it controls each frame by one of the clip, at the size of the clip, whatever height and
            width say.
        fixed_frames: the number of frames that it always makes; 0: as requested.
        latent_window: latent frames that it makes per loop, with several loops; 0: one loop makes all.
        frame_window: frames that it makes per loop, each loop beginning with the last frames of the one before; 0: one
            loop makes all.
        least_latents: the least number of latent frames, because it normalizes the first ones by those behind them.
        pixels: its check of inputs requires sizes that are multiples of this many pixels.
        patches: its check of inputs requires sizes that are multiples of this many patches of the transformer.
        caches_pictures: whether it caches what the transformer computes for input pictures.
        packages: packages that its license requires.
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
    usual_strength: float
    rounds_steps_down: bool
    takes_several: bool
    sized_by_image: bool
    may_lack: frozenset[str]
    needs_negative_prompt: bool
    prompts_are_json: bool
    scale: str
    gives_sigmas: bool
    makes_one: bool
    one_generator: bool
    counts_frames: bool
    takes_clips: bool
    keeps_clip: bool
    sized_by_clip: bool
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
    unset = {name for name, default in set_to.items() if patterns.is_none(default)}
    strength = dict(patterns.defaults(methods["__call__"])).get("strength")
    scale = "true_cfg_scale" if "true_cfg_scale" in set_to and patterns.guides(set_to) else "guidance_scale"
    return ClassicCall(
        parameters=(*names, *(argument.arg for argument in call.kwonlyargs)),
        scalars={n: kind for n, kind in map(patterns.scalar, (*call.args[1:], *call.kwonlyargs)) if kind},
        required=names[: len(names) - defaults],
        components=patterns.without_default(methods["__init__"].args),
        parts=tuple(argument.arg for argument in methods["__init__"].args.args[1:]),
        guided_above=next(patterns.thresholds(methods, scale), None),
        batches_branches=any(patterns.doubles(node) for node in ast.walk(methods["__call__"])),
        changes_attention=any("attn_proc" in getattr(node, "attr", "") for node in ast.walk(methods["__call__"])),
        encodes=any(name.startswith("encode_prompt") for name in methods),
        schedulers=OF_TWO_STEPS if "intermediate_timesteps" in names else patterns.schedulers(methods["__init__"].args),
        shows_progress=any(patterns.is_attribute(node, "progress_bar") for node in ast.walk(methods["__call__"])),
        takes_strength=any(a.arg == "strength" and patterns.one_number(a) for a in call.args),
        usual_strength=float(strength or 0),
        rounds_steps_down=ROUNDED_DOWN in ast.unparse(methods.get("get_timesteps", methods["__call__"])),
        takes_several=any(
            patterns.goes_through(node, name) for name in ("image", "images") for node in ast.walk(methods["__call__"])
        ),
        sized_by_image=any(
            patterns.takes_size_of_image(node, "height" in names) for node in ast.walk(methods["__call__"])
        ),
        may_lack=frozenset(
            name
            for name in unset
            if any(
                leaves(methods, name)
                for leaves in (patterns.may_lack, patterns.left_to_a_method, patterns.checked_if_given)
            )
        ),
        needs_negative_prompt=any(
            patterns.goes_through_all(node, "negative_prompt")
            for node in ast.walk(methods.get("encode_prompt", methods["__call__"]))
        ),
        prompts_are_json=any(
            patterns.calls(node, "is_valid_edit_json") for m in methods.values() for node in ast.walk(m)
        ),
        scale=scale,
        gives_sigmas=any(patterns.is_name(node, "sigmas") for node in ast.walk(methods["__call__"])),
        pixels=max(
            (patterns.pixels(node) for node in ast.walk(methods.get("check_inputs", methods["__call__"]))), default=1
        ),
        patches=max(
            (patterns.patches(node) for node in ast.walk(methods.get("check_inputs", methods["__call__"]))), default=1
        ),
        caches_pictures=any(patterns.is_attribute(node, "set_mode") for node in ast.walk(methods["__call__"])),
        packages=(GUARDRAIL,) if "CosmosSafetyChecker" in ast.unparse(methods["__init__"].args) else (),
        **_of_clips(methods),
    )


@functools.cache
def transformer_pipelines() -> Mapping[str, str]:
    """All pipelines of diffusers with a transformer, each with the class of its transformer, in order of names."""
    found: dict[str, str] = {}
    for source in (each for each in _sources() if "transformer:" in each):
        for kind in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
            made = (node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
            for argument in (argument for init in made for argument in init.args.args):
                if argument.arg == "transformer" and argument.annotation and "Pipeline" in kind.name:
                    found[kind.name] = ast.unparse(argument.annotation).removesuffix(" | None")
    return dict(sorted(found.items()))


def _classes(name: str) -> Iterator[ast.ClassDef]:
    """The definitions of a class in diffusers' pipelines. Only files that contain it are parsed."""
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


def _of_clips(methods: Mapping[str, ast.FunctionDef]) -> dict[str, Any]:
    """The fields of `ClassicCall` about clips and frames."""
    call = methods["__call__"]
    told = any(argument.arg == "num_frames" for argument in call.args.args)
    defaults = dict(patterns.defaults(call))
    windows = [defaults.get("latent_window_size"), defaults.get("base_num_frames")]
    latents, frames = (value if isinstance(value, int) else 0 for value in windows)
    nodes = [node for method in methods.values() for node in ast.walk(method)]
    one_generator = any(patterns.refuses_generators(node) or patterns.draws_by_one(node) for node in nodes)
    first = methods.get("normalize_first_frame")
    told_one = any(ast.unparse(part) == "num_videos_per_prompt = 1" for part in call.body)
    told_one = told_one or "view(1).repeat(2)" in ast.unparse(call)  # a timestep for each branch of one sample
    told_one = told_one or "[decode_timestep] * batch_size" in ast.unparse(call)  # for each prompt, not for each video
    told_one = told_one or DRAWS_TOKENS in methods
    takes_clips = "num_conditions = len(video)" in ast.unparse(call)
    return {
        "makes_one": one_generator or told_one or bool(frames),  # one by one: the transformer may take one only
        "one_generator": one_generator,
        "counts_frames": told and any(patterns.hands_on(node, "num_frames") for node in ast.walk(call)),
        "takes_clips": takes_clips,
        "keeps_clip": takes_clips or KEPT_CLIP in ast.unparse(call),
        "sized_by_clip": "preprocess_conditions" in methods,
        "fixed_frames": next((n for n in map(patterns.fixes_frames, ast.walk(call)) if n), 0),
        "latent_window": latents,
        "frame_window": frames,
        "least_latents": next((n + 1 for n in map(patterns.first_frames, ast.walk(first)) if n), 1) if first else 1,
    }
