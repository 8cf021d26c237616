"""Results, reports and models -> messages. For `service.rpc.methods`; `service.api.responses` does it for REST."""

import hashlib
import time
from collections.abc import Iterator

from deploy.spec import ModelSpec
from service.api.backend import Restarted, Waiting
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.rpc.requests import TASKS
from service.state.model_states import ModelState
from workers.messages import GenerationRequest, GenerationResult, Preview, StepEvent

Event = pb.GenerateStreamResponse


def image_response(request: GenerationRequest, result: GenerationResult, began: float) -> pb.GenerateImageResponse:
    """The answer of `GenerateImage`.

    Args:
        request: what was asked for.
        result: what was made.
        began: when the call did, by `time.monotonic`.
    """
    outputs = (pb.Output(header=header(request, result, index), data=data) for index, data in enumerate(result.outputs))
    return pb.GenerateImageResponse(
        outputs=outputs, metrics=_metrics(result, began), warnings=_warnings(result.warnings)
    )


def finished_events(
    request: GenerationRequest, result: GenerationResult, chunk_bytes: int, began: float, ignored: list[pb.Warning]
) -> Iterator[Event]:
    """The last events of a stream: each file's header and parts, and `done`.

    Args:
        request: what was asked for.
        result: what was made.
        chunk_bytes: the most that one event holds of a file.
        began: when the call did, by `time.monotonic`.
        ignored: warnings about options.
    """
    for index, data in enumerate(result.outputs):
        yield Event(output_header=header(request, result, index))
        for offset in range(0, len(data), chunk_bytes):
            part = data[offset : offset + chunk_bytes]
            yield Event(output_chunk=pb.OutputChunk(index=index, offset=offset, data=part))
    warnings = [*ignored, *_warnings(result.warnings)]
    yield Event(done=Event.Done(metrics=_metrics(result, began), warnings=warnings))


def report_event(report: StepEvent | Preview | Waiting | Restarted, taken: list[float]) -> Event:
    """The event of a report.

    Args:
        report: of the backend.
        taken: seconds of the steps so far, which this function keeps.
    """
    if isinstance(report, Waiting):
        state = report.state
        return Event(
            queued=pb.Queued(
                position=report.position,
                eta_seconds=report.wait_s,
                state=state.state,
                reason=state.reason,
                waiting=state.queued,
            )
        )
    if isinstance(report, Restarted):
        taken.clear()
        return Event(restarted=Event.Restarted(attempt=report.attempt, reason=report.reason))
    if isinstance(report, Preview):
        return Event(preview=pb.Preview(index=0, step=report.step, mime_type="image/jpeg", data=report.data))
    taken.append(report.seconds)
    left = report.total_steps - report.step
    return Event(
        progress=pb.Progress(
            step=report.step,
            total_steps=report.total_steps,
            eta_seconds=left * sum(taken) / len(taken),
            stage="denoise" if left else "decode",
            step_seconds=report.seconds,
        )
    )


def header(request: GenerationRequest, result: GenerationResult, index: int) -> pb.OutputHeader:
    """What is told of one file."""
    data, video = result.outputs[index], request.output_format == "mp4"
    return pb.OutputHeader(
        index=index,
        mime_type="video/mp4" if video else f"image/{request.output_format}",
        total_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        seed=result.seeds[index],
        width=request.width,
        height=request.height,
        num_frames=request.num_frames,
        fps=request.fps if video else 0,
    )


def model_message(model: ModelSpec, state: ModelState | None) -> pb.Model:
    """One model of `ListModels`."""
    numbers = {task: number for number, task in TASKS.items()}
    defaults = model.defaults.model_dump(exclude_none=True)
    if model.tasks is not None and "text-to-video" not in model.tasks:
        defaults = {name: value for name, value in defaults.items() if name not in ("num_frames", "fps")}
    return pb.Model(
        id=model.name,
        tasks=[numbers[task] for task in model.tasks or ()],  # type: ignore[misc]
        defaults=pb.GenerationParams(**defaults),
        replicas_ready=state.replicas.get("RUNNING", 0) if state else 0,
        gpus_per_replica=model.parallel.world_size if model.device == "cuda" else 0,
        state=state.state if state else "starting",
        reason=state.reason if state else "",
        aliases=model.aliases,
        layout=str(model.parallel),
        loras=dict.fromkeys(lora.name for lora in model.loras),
        limits=pb.GenerationLimits(**model.limits.model_dump(exclude_none=True)),
    )


def _metrics(result: GenerationResult, began: float) -> pb.Metrics:
    stages = {
        "encode": result.encode_seconds,
        "denoise": sum(result.step_seconds),
        "decode": result.decode_seconds,
    }
    return pb.Metrics(
        queue_seconds=max(0.0, time.monotonic() - began - result.seconds),
        generate_seconds=result.seconds,
        stage_seconds=stages,
        layout=str(result.degrees),
        step_seconds=result.step_seconds,
    )


def _warnings(texts: tuple[str, ...]) -> list[pb.Warning]:
    """The warnings of a result: which prompt was cut (`prompt: ...`), or that previews failed (`previews: ...`)."""
    return [_warning(text) for text in texts]


def _warning(text: str) -> pb.Warning:
    name = text.partition(":")[0]
    if name == "previews":
        return pb.Warning(code="previews_failed", message=text, param="options.preview_every_n_steps")
    return pb.Warning(code="prompt_truncated", message=text, param=f"params.{name}")
