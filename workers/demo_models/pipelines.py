"""Which demo model a pipeline of diffusers is proved with, and what it is asked for there.

The class name of a pipeline comes in. Of a family's file beside this one, or in `workers.model.adapters`, are read:

    demo_pipeline()   the tiny model of the family's first pipeline. If it takes a name, it makes others as well; else
                      they are built of the same parts
    REQUEST           fields of the requests that the family needs otherwise, such as its size
    REQUESTS          by class name, further such fields of one pipeline
    ROLES             by class name, what a pipeline may begin with besides: one more request of its proof
    CLIP_FRAMES       of the clips that it begins with, where these must be shorter than what it makes

Used by `workers.demo_models.writer`, `workers.support_matrix` and the tests.
"""

import importlib
import inspect
import pkgutil
from dataclasses import replace
from types import ModuleType
from typing import Any

import diffusers

from deploy.families.lookup import families, family_of
from sp_core.models.lookup import files
from workers.demo_models import classic
from workers.messages import GenerationRequest
from workers.model.sample_inputs import with_needed_inputs

CLASSIC = tuple(found.name for found in pkgutil.iter_modules(classic.__path__))

PICTURE = GenerationRequest(
    "a", "demo", "a cup of coffee", width=80, height=112, num_inference_steps=3, seed=3, n=2, guidance_scale=3.5
)
VIDEO = GenerationRequest(
    "a", "demo", "a cup of coffee", width=64, height=48, num_inference_steps=2, seed=3, guidance_scale=2.0,
    num_frames=9, output_format="mp4",
)  # fmt: skip


def served() -> dict[str, str]:
    """The name of the family of each pipeline that has a demo model to be proved with, by its class name."""
    modular = {family.pipeline: name for name, family in families().items()}
    called = {pipeline: name for name, found in files().items() for plan in found for pipeline in plan.pipelines}
    return modular | called


def demo_of(family: str, pipeline: str | None = None) -> Any:
    """The tiny model of a family's pipeline, the same weights at every call; None: of its first one."""
    make = demo_module(family).demo_pipeline
    if pipeline is None:
        return make()
    if inspect.signature(make).parameters:
        return make(pipeline)
    first = make()
    kind = getattr(diffusers, pipeline)
    if type(first) is kind:
        return first
    takes = inspect.signature(kind.__init__).parameters
    return kind(**{name: part for name, part in first.components.items() if name in takes})


def demo_module(family: str) -> ModuleType:
    """A family's file. Only this one is loaded: each imports its own text encoders and VAE."""
    room = classic.__name__ if family in CLASSIC else "workers.model.adapters"
    return importlib.import_module(f"{room}.{family}")


def requests_of(pipeline: str) -> list[GenerationRequest]:
    """What a pipeline is asked for in its proof: from text alone, and with what else it can begin with."""
    family = family_of(pipeline)
    usual = VIDEO if family.makes == "video" else PICTURE
    demo = demo_module(served()[pipeline])
    told = getattr(demo, "REQUEST", {}) | getattr(demo, "REQUESTS", {}).get(pipeline, {})
    usual = replace(usual, prompt=family.prompt_form % usual.prompt)
    text = replace(usual, negative_prompt=None if family.guided_above is None else "blurry", **told)
    needed = family.needs or tuple(family.begins_with)[:1]
    if pipeline in (modular.pipeline for modular in families().values()):
        needed = ()  # its pictures are those of other pipelines, by `PipelineFamily.with_pictures`
    more = getattr(demo, "ROLES", {}).get(pipeline, ())
    strength = 0.7 if family.takes_strength else None
    given = replace(text, n=1, num_inference_steps=told.get("num_inference_steps", 4), strength=strength)
    clip = replace(given, num_frames=getattr(demo, "CLIP_FRAMES", given.num_frames))
    brought = [roles for roles in (needed, (*needed, *more) if more else ()) if roles]
    found = (with_needed_inputs(clip, replace(family, needs=roles)) for roles in brought)
    return ([] if family.needs else [text]) + [replace(given, inputs=each.inputs) for each in found]
