"""Turns messages into response bodies: OpenAI's image response and events, and its model object. For the routers.

Keys that OpenAI's bodies do not have (seeds, timings, states) are added to them; OpenAI's client keeps them.
"""

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deploy.model_spec import ModelSpec
from service.api.made import frames_again, made_size
from service.jobs.records import Job, State
from service.jobs.requests import REMIXED_FROM, asked_of
from workers.messages import GenerationRequest, GenerationResult, Preview, StepEvent

if TYPE_CHECKING:
    from service.state.model_states import ModelState  # loads Ray, and a command that needs none imports this file


def ignored_header(ignored: Sequence[str]) -> dict[str, str]:
    """The header that names the request's fields without effect; no header if there are none."""
    return {"x-ignored-params": ", ".join(ignored)} if ignored else {}


def warnings_header(result: GenerationResult) -> dict[str, str]:
    """The header with the warnings for the caller; no header if there are none."""
    return {"x-warnings": "; ".join(result.warnings)} if result.warnings else {}


def generation_response(
    request: GenerationRequest, result: GenerationResult, data: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """OpenAI's ImagesResponse, with seeds, layout and timings as extra keys.

    Args:
        request: what was asked for.
        result: the result of the request.
        data: for each picture or video its seed, and its content or URL.
    """
    made = made_size(request.width, request.height, request.num_frames, result.warnings)
    video = {"num_frames": made.num_frames, "fps": request.fps} if is_video(request) else {}
    return {
        "created": int(result.created_at or time.time()),
        "data": [dict(each) for each in data],
        "size": f"{made.width}x{made.height}",
        "output_format": request.output_format,
        "background": "opaque",
        **video,
        "metrics": metrics(result),
        "warnings": list(result.warnings),
    }


def is_video(request: GenerationRequest) -> bool:
    """True for a video, False for pictures."""
    return request.output_format == "mp4"


def metrics(result: GenerationResult) -> dict[str, Any]:
    """The layout that computed a result, and the seconds of each stage."""
    return {
        "layout": str(result.degrees),
        "encode_seconds": result.encode_seconds,
        "step_seconds": list(result.step_seconds),
        "decode_seconds": result.decode_seconds,
        "encode_media_seconds": result.encode_media_seconds,
    }


def progress_event(request: GenerationRequest, event: StepEvent) -> dict[str, Any]:
    """The stream event of one step."""
    return {
        "type": f"{_subject(request)}.progress",
        "step": event.step,
        "total_steps": event.total_steps,
        "seconds": event.seconds,
    }


def partial_event(request: GenerationRequest, preview: Preview) -> dict[str, Any]:
    """OpenAI's stream event of a preview. The size is that of the picture to come."""
    return {
        "type": f"{_subject(request)}.partial_image",
        "b64_json": base64.b64encode(preview.data).decode(),
        "partial_image_index": preview.index,
        "created_at": int(time.time()),
        "size": f"{request.width}x{request.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": "jpeg",
    }


def completed_events(request: GenerationRequest, response: Mapping[str, Any]) -> list[dict[str, Any]]:
    """OpenAI's stream event for each finished picture, or video, of a `generation_response`."""
    shared = {key: value for key, value in response.items() if key not in ("created", "data")}
    shared |= {"type": f"{_subject(request)}.completed", "created_at": response["created"], "quality": "auto"}
    return [shared | made for made in response["data"]]


def _subject(request: GenerationRequest) -> str:
    if is_video(request):
        return "video_generation"
    return "image_edit" if request.inputs else "image_generation"


STATUS_OF: Mapping[State, str] = {"queued": "queued", "running": "in_progress", "succeeded": "completed"}
"""OpenAI's word for each state; all others are failures with a code of their own."""


def video_object(job: Job, position: int = 0) -> dict[str, Any]:
    """OpenAI's Video.

    Args:
        job: of kind video.
        position: its place among the jobs that wait for its model; 0: it does not wait, or the place was not asked for.
    """
    asked, done = job.request, job.state == "succeeded"
    made = made_size(asked["width"], asked["height"], asked["num_frames"], job.warnings)
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": STATUS_OF.get(job.state, "failed"),
        "progress": _percent(job),
        "created_at": int(job.created_at),
        "completed_at": int(job.ended_at) if done and job.ended_at else None,
        "expires_at": int(job.expires_at) if job.expires_at else None,
        "error": {"code": job.error.code, "message": job.error.message} if job.error else None,
        "prompt": asked["prompt"],
        "remixed_from_video_id": asked.get(REMIXED_FROM),
        "seconds": f"{made.num_frames / asked['fps']:g}",
        "size": f"{made.width}x{made.height}",
        "seed": asked["seed"],
        "num_frames": made.num_frames,
        "fps": asked["fps"],
        "priority": job.priority,
        "position": position,
        "step": job.step,
        "total_steps": job.total_steps,
        "attempt": job.attempt,
        "metrics": dict(job.metrics) or None,
        "warnings": list(job.warnings),
    }


def job_object(job: Job, position: int = 0) -> dict[str, Any]:
    """A job of any kind; `position` as in `video_object`."""
    asked, video = asked_of(job), job.kind == "video"
    files = [
        {"index": at, "output_format": each.kind, "seed": each.seed, "bytes": each.size, "sha256": each.sha256}
        for at, each in enumerate(job.outputs)
    ]
    request = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "size": f"{asked.width}x{asked.height}",
        "num_inference_steps": asked.num_inference_steps,
        "guidance_scale": asked.guidance_scale,
        "guidance_scale_2": asked.guidance_scale_2 if video else None,
        "flow_shift": asked.flow_shift,
        "strength": asked.strength,
        "extra_params": dict(asked.extra_params),
        "seeds": list(asked.all_seeds),
        "loras": [{"name": name, "scale": scale} for name, scale in asked.loras],
        "num_frames": frames_again(asked, job.warnings) if video else None,
        "fps": asked.fps if video else None,
        "output_format": asked.output_format,
        "embed_metadata": asked.embed_metadata,
    }
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "model": job.model,
        "state": job.state,
        "progress": _percent(job),
        "position": position,
        "step": job.step,
        "total_steps": job.total_steps,
        "attempt": job.attempt,
        "priority": job.priority,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "deadline_at": job.deadline_at,
        "expires_at": job.expires_at,
        "error": asdict(job.error) if job.error else None,
        "request": request,
        "outputs": files,
        "metrics": dict(job.metrics) or None,
        "warnings": list(job.warnings),
    }


def _percent(job: Job) -> int:
    """The progress of the steps in percent; 100 only when the files are there."""
    return 100 if job.state == "succeeded" else min(99, 100 * job.step // max(1, job.total_steps))


def model_object(model: ModelSpec, state: "ModelState | None") -> dict[str, Any]:
    """OpenAI's Model; state, layout and limits are extra keys."""
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "spray",
        "aliases": list(model.aliases),
        "tasks": list(model.tasks or ()),
        "state": state.state if state else "starting",
        "reason": state.reason if state else "",
        "eta_seconds": eta_seconds(state),
        "layout": str(model.parallel),
        "loras": list(dict.fromkeys(lora.name for lora in model.loras)),
        "defaults": model.defaults.model_dump(),
        "limits": model.limits.model_dump(),
    }


def eta_seconds(state: "ModelState | None", position: int = 1) -> float | None:
    """Seconds until a typical request would be answered; None if the gangs have not learned that yet.

    Args:
        state: the state of its model.
        position: 1 for a request that comes now; n for the n-th waiting job.
    """
    gangs = [gang for gang in state.gangs if gang.get("request_s")] if state else []
    if state is None or state.state != "running" or not gangs:
        return None
    costs_s = sum(gang["request_s"] for gang in gangs) / len(gangs)
    takes_s = sum(gang.get("takes_s") or gang["request_s"] for gang in gangs) / len(gangs)
    backlog = sum(gang["backlog_s"] for gang in gangs) + (state.queued + position - 1) * costs_s
    return float(round(backlog / len(gangs) + takes_s, 1))
