"""Results, reports and models -> messages. For `service.rpc.methods`; `service.api.responses` does it for REST."""

import hashlib
import time
from collections.abc import Iterator

from deploy.model_spec import ModelSpec
from deploy.tasks import makes_video
from service.api.backend import Restarted, Waiting
from service.api.job_calls import Seen
from service.api.made import frames_again, made_size
from service.api.outputs import KINDS
from service.jobs.records import Job, JobOutput
from service.jobs.requests import asked_of
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.rpc.requests import TASKS
from service.state.model_states import ModelState
from workers.messages import GenerationRequest, GenerationResult, Preview, StepEvent

Event = pb.GenerateStreamResponse

WARNINGS = {
    "previews": ("previews_failed", "options.preview_every_n_steps"),
    "size": ("size_changed", "params.width"),
    "num_frames": ("num_frames_changed", "params.num_frames"),
}
"""Code and parameter of a warning, by what it is about; all others are of texts that were cut."""


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
    made = made_size(request.width, request.height, request.num_frames, result.warnings)
    return pb.OutputHeader(
        index=index,
        mime_type="video/mp4" if video else f"image/{request.output_format}",
        total_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        seed=result.seeds[index],
        width=made.width,
        height=made.height,
        num_frames=made.num_frames,
        fps=request.fps if video else 0,
    )


def job_message(seen: Seen) -> pb.Job:
    """A job, in the words of the contract."""
    job, made = seen.job, pb.Job(id=seen.job.id, state=f"JOB_STATE_{seen.job.state.upper()}")
    made.params.CopyFrom(_params(job))
    if job.total_steps:
        decodes = job.step == job.total_steps
        made.progress.CopyFrom(
            pb.Progress(step=job.step, total_steps=job.total_steps, stage="decode" if decodes else "denoise")
        )
    made.progress.eta_seconds = seen.eta_s or 0.0
    if job.error is not None:
        made.error.CopyFrom(pb.JobError(code=job.error.code, message=job.error.message, param=job.error.param))
    made.outputs.extend(output_header(job, output, index) for index, output in enumerate(job.outputs))
    if job.metrics:
        made.metrics.CopyFrom(_metrics_of(job))
    times = {"create": job.created_at, "start": job.started_at, "finish": job.ended_at, "expire": job.expires_at}
    for name, at in times.items():
        if at is not None:
            getattr(made, f"{name}_time").FromMilliseconds(round(at * 1000))
    made.warnings.extend(_warnings(job.warnings))
    made.attempt, made.position = job.attempt, seen.position
    made.scheduling.CopyFrom(pb.Scheduling(priority=f"PRIORITY_{job.priority.upper()}"))
    if job.deadline_at is not None:
        made.scheduling.deadline_seconds = round(job.deadline_at - job.created_at, 3)
    return made


def output_header(job: Job, output: JobOutput, index: int) -> pb.OutputHeader:
    """What is told of one file of a job."""
    asked, video = job.request, output.kind == "mp4"
    made = made_size(asked["width"], asked["height"], asked["num_frames"], job.warnings)
    return pb.OutputHeader(
        index=index,
        mime_type=KINDS[output.kind],
        total_bytes=output.size,
        sha256=output.sha256,
        seed=output.seed,
        width=made.width,
        height=made.height,
        num_frames=made.num_frames,
        fps=asked["fps"] if video else 0,
    )


def _params(job: Job) -> pb.GenerationParams:
    """What was asked for, with all that was settled when the job was accepted. Sent again, it is the same request."""
    asked, video = asked_of(job), job.kind == "video"
    lossy = asked.output_format in ("jpeg", "webp")
    task = pb.TASK_TEXT_TO_VIDEO if video else pb.TASK_TEXT_TO_IMAGE
    if job.request.get("inputs"):  # which tell it
        task = pb.TASK_UNSPECIFIED
    params = pb.GenerationParams(
        model=job.model,
        task=task,
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        n=asked.n,
        width=asked.width,
        height=asked.height,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=None if asked.true_cfg else asked.guidance_scale,
        true_cfg_scale=asked.guidance_scale if asked.true_cfg else None,
        guidance_scale_2=asked.guidance_scale_2 if video else None,
        flow_shift=asked.flow_shift,
        strength=asked.strength,
        seed=None if asked.seeds else asked.seed,
        seeds=asked.seeds,
        num_frames=frames_again(asked, job.warnings) if video else None,
        fps=asked.fps if video else None,
        loras=[pb.Lora(name=name, scale=scale) for name, scale in asked.loras],
        output_format=asked.output_format,
        output_quality=asked.output_compression if lossy else None,
        embed_metadata=asked.embed_metadata,
    )
    if asked.extra_params:
        params.extra.update(dict(asked.extra_params))
    return params


def _metrics_of(job: Job) -> pb.Metrics:
    """The metrics of a job that has succeeded."""
    told, steps = job.metrics, job.metrics["step_seconds"]
    stages = {"encode": told["encode_seconds"], "denoise": sum(steps), "decode": told["decode_seconds"]}
    took = sum(stages.values()) + told["encode_media_seconds"]
    return pb.Metrics(
        queue_seconds=max(0.0, (job.ended_at or job.created_at) - job.created_at - took),
        generate_seconds=took,
        stage_seconds=stages,
        layout=told["layout"],
        step_seconds=steps,
    )


def model_message(model: ModelSpec, state: ModelState | None) -> pb.Model:
    """One model of `ListModels`."""
    numbers = {task: number for number, task in TASKS.items()}
    defaults = model.defaults.model_dump(exclude_none=True)
    if model.tasks is not None and not any(makes_video(task) for task in model.tasks):
        defaults = {name: value for name, value in defaults.items() if name not in ("num_frames", "fps")}
    return pb.Model(
        id=model.name,
        tasks=[numbers[task] for task in model.tasks or ()],  # type: ignore[misc]
        defaults=pb.GenerationParams(**defaults),
        replicas_ready=state.ready if state else 0,
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
    """The warnings of a result. Each text begins with the name of what it is about."""
    return [_warning(text) for text in texts]


def _warning(text: str) -> pb.Warning:
    name = text.partition(":")[0]
    code, param = WARNINGS.get(name, ("prompt_truncated", f"params.{name}"))
    return pb.Warning(code=code, message=text, param=param)
