"""The family of a pipeline without a file of its own, derived from the source of its classic call.

The class name of a pipeline comes in; a `PipelineFamily` goes out, or the reason why spray does not serve the pipeline.
Its transformer needs a plan in `sp_core.models`. Called by `deploy.families.lookup`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.families.family import PipelineFamily
from deploy.families.pipeline_source import ClassicCall, classic_call
from deploy.families.schedulers import schedulers_of
from deploy.model_folder import read_config
from deploy.model_spec import Task
from deploy.tasks import tasks_of
from sp_core.models.lookup import families as plans
from sp_core.models.lookup import find_family as find_plan

NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator")
"""Parameters that carry a request to a pipeline."""

ROLES: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "reference_images", "images"),
    "mask": ("mask_image", "mask", "control_mask"),
    "last_image": ("last_image",),
    "control_image": ("control_image",),
    "video": ("video", "control_video"),
}
"""The roles of the inputs of requests, each with the parameters of pipelines that take it."""

NOT_BROUGHT = frozenset({"mask_video", "conditions"})
"""Parameters of pipelines for pictures and clips that no request can bring."""

VIDEOS = frozenset({"num_frames", "frames", "video_length", "num_videos_per_prompt"})
"""Parameters of pipelines that make videos."""

EDIT_INSTRUCTION = '{"edit_instruction": "%s"}'
"""The form of a prompt, for pipelines that take JSON instead of plain text."""

BASIC = (
    "scheduler",
    "text_encoder",
    "tokenizer",
    "processor",
    "transformer",
    "unconditional_transformer",
    "vae",
    "controlnet",
)
"""Components without which no request can run, among those that pipelines take."""


VAE_IN_FP32 = frozenset(
    {
        "AllegroPipeline",
        "ChronoEditPipeline",
        "LucyEditPipeline",
        "SanaImageToVideoPipeline",
        "SanaPipeline",
        "SanaVideoPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2Pipeline",
        "WanImageToVideoPipeline",
        "WanVACEPipeline",
        "WanVideoToVideoPipeline",
    }
)
"""Pipelines whose examples in diffusers run the VAE in fp32. Others do not give it what it reads in that type."""


UNSHIFTED_VAE_IN_FP32 = frozenset({"BriaPipeline"})
"""Pipelines whose examples in diffusers run the VAE in fp32 if its config has no `shift_factor`."""


IMAGE_ENCODER_IN_FP32 = frozenset({"ChronoEditPipeline", "WanImageToVideoPipeline"})
"""Pipelines whose examples in diffusers run the encoder of the first picture in fp32; its result is rounded later."""


TEXT_ENCODER_IN_FP32: Mapping[str, frozenset[str]] = {"BriaPipeline": frozenset({"wo"})}
"""Pipelines whose examples in diffusers run parts of the text encoder in fp32, as path components of their names."""


def classic_family(pipeline: str) -> PipelineFamily:
    """The family of a pipeline that runs through its classic call.

    Raises:
        ValueError: spray does not serve it; the message says why.
    """
    call = classic_call(pipeline)
    if call is None:
        raise ValueError("diffusers has no such pipeline with a call of its own")
    if reason := _refusal(call):
        raise ValueError(reason)
    begins_with = _begins_with(call)
    makes_video = _makes_video(call)
    needs = _needs(call, begins_with)
    return PipelineFamily(
        pipeline=pipeline,
        makes="video" if makes_video else "image",
        with_pictures=dict.fromkeys(_tasks(call, begins_with, needs, makes_video), pipeline),
        begins_with=begins_with,
        needs=needs,
        takes_several=call.takes_several,
        sized_by_image=call.sized_by_image,
        takes_strength=call.takes_strength,
        guided_above=_guided_above(call),
        guided_by_negative_prompt=call.scale == "true_cfg_scale",
        batches_branches=call.batches_branches,
        prompt_form=EDIT_INSTRUCTION if call.prompts_are_json else "%s",
        components=tuple(name for name in BASIC if name in call.parts),
        packages=call.packages,
        vae_in_fp32=pipeline in VAE_IN_FP32,
        schedulers=schedulers_of(call.schedulers, call.gives_sigmas),
    )


def proved_pipelines() -> tuple[str, ...]:
    """The pipelines that run through their classic call."""
    return tuple(pipeline for plan in plans() for pipeline in plan.pipelines)


def check_proved(pipeline: str, transformer: Any) -> None:
    """Reject a pipeline that was not proved with its transformer. The author of a class outside diffusers must prove
    it.

    Args:
        pipeline: its class name.
        transformer: the entry of its transformer in `model_index.json`.

    Raises:
        ValueError: there is no proof; the message says what is missing.
    """
    match transformer:
        case ["diffusers", str(name)]:
            plan = find_plan([name])
            if plan is None or plan.refused:
                raise ValueError(plan.refused if plan else f"nothing says how its {name} is divided among ranks")
            if pipeline in plan.refused_pipelines:
                raise ValueError(plan.refused_pipelines[pipeline])
            if pipeline not in plan.pipelines:
                raise ValueError(f"its {name} has a plan, but nobody has proved this pipeline with it")
        case [str(), str()]:
            pass
        case _:
            raise ValueError("it has no transformer")


def check_config(folder: Path, index: Mapping[str, Any]) -> None:
    """Reject a transformer with a config for which its plan is not right.

    Args:
        folder: of the model; a config that is not there yet is not checked.
        index: its `model_index.json`.

    Raises:
        ValueError: the plan does not fit; the message names the file and says why.
    """
    file = folder / "transformer" / "config.json"
    match index.get("transformer"):
        case ["diffusers", str(name)] if (plan := find_plan([name])) and file.exists():
            if reason := plan.refuses(read_config(file)):
                raise ValueError(f"{file}: {reason}")


def check_controlnet(folder: Path, index: Mapping[str, Any]) -> None:
    """Reject several ControlNets in one: each would need a picture of its own, and requests bring one.

    Args:
        folder: of the model.
        index: its `model_index.json`.

    Raises:
        ValueError: there are several; the message says what to do.
    """
    match index.get("controlnet"):
        case [str(), str(name)] if "Multi" in name:
            raise ValueError(f"{folder} has a {name}, but requests bring one control image; name one ControlNet")


def _refusal(call: ClassicCall) -> str:
    begins_with = _begins_with(call)
    not_brought = sorted(NOT_BROUGHT & set(call.parameters) - (call.may_lack if begins_with else set()))
    sized_by_image = call.sized_by_image or begins_with.get("image") in call.required
    told = {"height", "width"} if sized_by_image else set()
    missing = [name for name in NEEDED if name not in (*call.parameters, *told)]
    others = [name for name in call.required if name not in (*NEEDED, *begins_with.values())]
    if not_brought:
        return f"its call takes {', '.join(not_brought)}, which requests do not bring"
    if call.changes_attention:
        return "its call exchanges attention processors, which are what makes a transformer parallel"
    if any("audio" in name for name in call.parameters):
        return "it makes sound"
    if missing or others:
        return f"its call has no {', '.join(missing)}" if missing else f"its call needs {', '.join(others)}"
    if not call.encodes or not call.shows_progress:
        return "its call has no encode_prompt or no progress_bar, where it can be stopped"
    return ""


def _guided_above(call: ClassicCall) -> float | None:
    """The scale above which there is a second branch; None: a request's scale is an input of the model."""
    if "negative_prompt" not in call.parameters:
        return None
    return 1.0 if "guider" in call.parts else call.guided_above


def _begins_with(call: ClassicCall) -> dict[str, str]:
    """The roles of the inputs that it takes, each with its parameter."""
    found = {role: next((n for n in names if n in call.parameters), "") for role, names in ROLES.items()}
    brought = {role: name for role, name in found.items() if name}
    if _makes_video(call):
        brought.pop("mask", None)  # it is a clip as well, which requests do not bring
    if call.caches_pictures:
        brought.pop("image", None)  # attention to a cache of this rank's tokens would leave the others' out
    return brought


def _makes_video(call: ClassicCall) -> bool:
    return bool((VIDEOS | set(ROLES["video"])) & set(call.parameters))


def _needs(call: ClassicCall, begins_with: Mapping[str, str]) -> tuple[str, ...]:
    """The roles that it needs to begin. A mask needs an image."""
    needed = {role for role, name in begins_with.items() if name not in call.may_lack and role != "last_image"}
    needed |= {"image"} & begins_with.keys() if "mask" in needed else set()
    return tuple(role for role in begins_with if role in needed)


def _tasks(call: ClassicCall, begins_with: Mapping[str, str], needs: tuple[str, ...], makes_video: bool) -> list[Task]:
    """The tasks that its inputs allow."""
    optional = [role for role in begins_with if role not in needs]
    brought = [needs] if needs else []
    brought += [(*needs, role) for role in optional]
    found = [tasks_of(roles, makes_video) for roles in brought]
    return list(dict.fromkeys(tasks[-1] if not call.takes_strength else tasks[0] for tasks in found))
