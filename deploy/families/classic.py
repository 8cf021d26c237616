"""Any pipeline without a file of its own: its family follows from the source of its classic call.

The class name of a pipeline comes in; a `PipelineFamily` goes out, or the reason why spray does not serve it. Its
transformer needs a plan in `sp_core.models`. Called by `deploy.families.lookup`.
"""

from typing import Any

from deploy.families.family import PipelineFamily
from deploy.families.pipeline_source import ClassicCall, classic_call
from deploy.families.schedulers import FLOW_MATCH
from sp_core.models.lookup import families as plans
from sp_core.models.lookup import find_family as find_plan

NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator", "callback_on_step_end")
"""Parameters by which a request is told to a pipeline, and by which we stop it after each step."""

PICTURES = frozenset({"image", "images", "video", "mask_image", "mask", "control_image", "control_video", "conditions"})
"""Parameters of pipelines that start from pictures."""

VIDEOS = frozenset({"num_frames", "frames", "num_videos_per_prompt"})
"""Parameters of pipelines that make videos."""

BASIC = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
"""Of the components that a pipeline is built of: those that no request can do without."""


def classic_family(pipeline: str) -> PipelineFamily:
    """The family of a pipeline that runs through its classic call.

    Raises:
        ValueError: says why spray does not serve it.
    """
    call = classic_call(pipeline)
    if call is None:
        raise ValueError("diffusers has no such pipeline with a call of its own")
    if reason := _refusal(call):
        raise ValueError(reason)
    return PipelineFamily(
        pipeline=pipeline,
        makes="video" if VIDEOS & set(call.parameters) else "image",
        guided_above=call.guided_above if _guided(call) else None,
        batches_branches=call.batches_branches,
        components=tuple(name for name in BASIC if name in call.components),
        schedulers=FLOW_MATCH,
    )


def proved_pipelines() -> tuple[str, ...]:
    """Those that run through their classic call."""
    return tuple(pipeline for plan in plans() for pipeline in plan.pipelines)


def check_proved(pipeline: str, transformer: Any) -> None:
    """Reject a pipeline that nobody has proved with its transformer. A class from elsewhere is its author's to prove.

    Args:
        pipeline: its class name.
        transformer: the entry of its transformer in `model_index.json`.

    Raises:
        ValueError: says what is missing.
    """
    match transformer:
        case ["diffusers", str(name)]:
            plan = find_plan([name])
            if plan is None or plan.refused:
                raise ValueError(plan.refused if plan else f"nothing says how its {name} is divided among ranks")
            if pipeline not in plan.pipelines:
                raise ValueError(f"its {name} has a plan, but nobody has proved this pipeline with it")
        case [str(), str()]:
            pass
        case _:
            raise ValueError("it has no transformer")


def _refusal(call: ClassicCall) -> str:
    pictures = sorted(PICTURES & set(call.parameters))
    missing = [name for name in NEEDED if name not in call.parameters]
    others = [name for name in call.required if name not in NEEDED]
    if pictures:
        return f"its call takes {', '.join(pictures)}, and requests bring no pictures to a classic call yet"
    if call.changes_attention:
        return "its call exchanges attention processors, which are what makes a transformer parallel"
    if any("audio" in name for name in call.parameters):
        return "it makes sound"
    if missing or others:
        return f"its call has no {', '.join(missing)}" if missing else f"its call needs {', '.join(others)}"
    if not call.encodes or not call.shows_progress:
        return "its call has no encode_prompt or no progress_bar, where it can be stopped"
    return ""


def _guided(call: ClassicCall) -> bool:
    """Whether `guidance_scale` is that of a second branch. Beside a `true_cfg_scale` it is an input of the model."""
    return "negative_prompt" in call.parameters and "true_cfg_scale" not in call.parameters
