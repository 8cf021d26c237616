"""Messages -> response bodies: OpenAI's image response and events, and its model object. For the routers.

Keys that OpenAI's bodies do not have (seeds, timings, states) come beside its own; its client keeps them.
"""

import base64
import time
from collections.abc import Sequence
from typing import Any

from deploy.spec import ModelSpec
from service.state.model_states import ModelState
from workers.messages import GenerationRequest, GenerationResult, StepEvent


def ignored_header(ignored: Sequence[str]) -> dict[str, str]:
    """The header that names the request's fields without effect; no header if there are none."""
    return {"x-ignored-params": ", ".join(ignored)} if ignored else {}


def warnings_header(result: GenerationResult) -> dict[str, str]:
    """The header with what the caller should know; no header if there is nothing."""
    return {"x-warnings": "; ".join(result.warnings)} if result.warnings else {}


def images_response(request: GenerationRequest, result: GenerationResult) -> dict[str, Any]:
    """OpenAI's ImagesResponse, with seeds, layout and timings as extra keys."""
    return {
        "created": int(time.time()),
        "data": [
            {"b64_json": base64.b64encode(image).decode(), "seed": seed}
            for image, seed in zip(result.outputs, result.seeds, strict=True)
        ],
        "size": f"{request.width}x{request.height}",
        "output_format": request.output_format,
        "background": "opaque",
        "metrics": metrics(result),
        "warnings": list(result.warnings),
    }


def metrics(result: GenerationResult) -> dict[str, Any]:
    """The layout that computed a result, and the seconds of each stage."""
    return {
        "layout": str(result.degrees),
        "encode_seconds": result.encode_seconds,
        "step_seconds": list(result.step_seconds),
        "decode_seconds": result.decode_seconds,
    }


def progress_event(event: StepEvent) -> dict[str, Any]:
    """The stream event of one step."""
    return {
        "type": "image_generation.progress",
        "step": event.step,
        "total_steps": event.total_steps,
        "seconds": event.seconds,
    }


def completed_events(request: GenerationRequest, result: GenerationResult) -> list[dict[str, Any]]:
    """OpenAI's stream event for each finished picture."""
    response = images_response(request, result)
    shared = {key: response[key] for key in ("size", "output_format", "background", "metrics", "warnings")}
    shared |= {"type": "image_generation.completed", "created_at": response["created"], "quality": "auto"}
    return [shared | picture for picture in response["data"]]


def model_object(model: ModelSpec, state: ModelState | None) -> dict[str, Any]:
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
        "layout": str(model.parallel),
        "loras": list(dict.fromkeys(lora.name for lora in model.loras)),
        "defaults": model.defaults.model_dump(),
        "limits": model.limits.model_dump(),
    }
