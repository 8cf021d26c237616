"""Messages -> `GenerationRequest`: a message becomes a body of REST and is validated as one. For `service.rpc.methods`.

So there is one set of rules. Each field that is set goes into the body by its name, and what REST's body does not know
is refused by that name; only what has another name or shape in REST is named here. Errors name the field by its path in
the message, such as `params.width`.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from deploy.model_spec import ModelSpec, Task
from deploy.tasks import makes_video, tasks_of
from service.api.bodies import MOST_JOB_SECONDS, ImageEditBody, ImageGenerationBody, VideoGenerationBody, parse_body
from service.api.origin import ID, MOST_SECONDS, new_id
from service.api.pictures import from_data_url, read_pictures
from service.api.schemas import find_model, media_of, most_frames, to_request
from service.jobs.records import Priority
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from workers.errors import InvalidParameter, ModelNotFound
from workers.messages import PREVIEW_EDGE, GenerationRequest, PreviewDecoder, PreviewOptions

TASKS: dict[int, Task] = {
    pb.TASK_TEXT_TO_IMAGE: "text-to-image",
    pb.TASK_TEXT_TO_VIDEO: "text-to-video",
    pb.TASK_IMAGE_TO_IMAGE: "image-to-image",
    pb.TASK_INPAINT: "inpaint",
    pb.TASK_EDIT: "edit",
    pb.TASK_CONTROL: "control",
    pb.TASK_IMAGE_TO_VIDEO: "image-to-video",
    pb.TASK_FIRST_LAST_FRAME_TO_VIDEO: "first-last-frame-to-video",
    pb.TASK_VIDEO_TO_VIDEO: "video-to-video",
}

EDIT_FIELDS = {"image": "image", "mask": "mask", "control_image": "control_image"}
VIDEO_FIELDS = {"image": "input_reference", "last_image": "last_image", "video": "video"}
"""The roles of inputs, by the fields of REST's bodies that they are."""

PRIORITIES: dict[int, Priority] = {
    pb.PRIORITY_UNSPECIFIED: "standard",
    pb.PRIORITY_INTERACTIVE: "interactive",
    pb.PRIORITY_STANDARD: "standard",
    pb.PRIORITY_BATCH: "batch",
}

EVERY = "options.preview_every_n_steps"

LEAST_EDGE, MOST_EDGE = 32, 1024
"""Pixels of a preview's longer edge."""

OTHER_NAMES = {"output_compression": "output_quality", "size": "width", "extra_params": "extra"}
OTHER_NAMES |= dict.fromkeys(("image", "mask", "control_image", "input_reference", "last_image", "video"), "inputs")
"""Fields of REST's bodies that are called otherwise here."""

CHUNK_BYTES = 1 << 20
LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES = 4 << 10, 2 << 20
"""Of a stream's messages: clients receive at most 4 MiB unless told otherwise, and each message costs some."""


async def to_generation(
    message: pb.GenerateImageRequest | pb.GenerateStreamRequest, models: dict[str, ModelSpec], request_id: str
) -> GenerationRequest:
    """The request of a message.

    Args:
        message: of either RPC; `GenerateImage` makes no videos.
        models: of the deployment, by name.
        request_id: what `id_of` returned.

    Raises:
        InvalidParameter: a field is wrong or not supported, or the model is for another task.
        ModelNotFound: the deployment does not have the model.
        QueueFull: too many pictures are being decoded.
    """
    _reject_newer(message, "")
    if message.scheduling.priority:
        name = "scheduling.priority"
        raise InvalidParameter(name, f"{name} is for jobs; call CreateJob", "unknown_parameter")
    seconds = _deadline_seconds(message.scheduling, MOST_SECONDS)
    request = await _request(message.params, models, request_id, unary=isinstance(message, pb.GenerateImageRequest))
    return replace(request, deadline_at=None if seconds is None else time.time() + seconds)


async def to_job(
    message: pb.CreateJobRequest, models: dict[str, ModelSpec], request_id: str
) -> tuple[GenerationRequest, Priority, float | None]:
    """The request of a job, its priority, and its deadline in seconds from now; None: none.

    Raises:
        InvalidParameter: a field is wrong or not supported, or the model is for another task.
        ModelNotFound: the deployment does not have the model.
    """
    _reject_newer(message, "")
    if message.labels:
        raise InvalidParameter("labels", "labels is not supported yet", "unknown_parameter")
    given = message.scheduling.priority
    if given not in PRIORITIES:
        known = ", ".join(map(pb.Priority.Name, PRIORITIES))
        raise InvalidParameter("scheduling.priority", f"scheduling.priority must be one of {known}, got {given}")
    seconds = _deadline_seconds(message.scheduling, MOST_JOB_SECONDS)
    return await _request(message.params, models, request_id, unary=False), PRIORITIES[given], seconds


async def _request(
    params: pb.GenerationParams, models: dict[str, ModelSpec], request_id: str, unary: bool
) -> GenerationRequest:
    with in_message():
        model = find_model(models, params.model or None)
        task = _task(params, model, streams=not unary)
        body = parse_body(_body(params, task), _kind(task, bool(params.inputs)))
        files = media_of(body, model)
        return to_request(
            body, model, request_id, await read_pictures(files, most_frames(body, model)) if files else ()
        )


def _deadline_seconds(scheduling: pb.Scheduling, most: int) -> float | None:
    """After how many seconds the request is worth nothing anymore; None: never.

    Raises:
        InvalidParameter: they are not in the future, or too many.
    """
    if not scheduling.HasField("deadline_seconds"):
        return None
    if not 0 < scheduling.deadline_seconds <= most:
        name = "scheduling.deadline_seconds"
        raise InvalidParameter(name, f"{name} must be above 0 and at most {most}, got {scheduling.deadline_seconds:g}")
    return scheduling.deadline_seconds


async def to_streamed(
    message: pb.GenerateStreamRequest, models: dict[str, ModelSpec], request_id: str
) -> GenerationRequest:
    """The same with a report for each step, and the previews that its options ask for.

    Raises:
        InvalidParameter: likewise.
    """
    previews = _previews(message.options)
    return replace(await to_generation(message, models, request_id), report_steps=True, previews=previews)


def _previews(options: pb.StreamOptions) -> PreviewOptions | None:
    every, edge, decoder = options.preview_every_n_steps, options.preview_max_edge, options.preview_decoder
    if every < 0:
        raise InvalidParameter(EVERY, f"preview_every_n_steps must be 0 (no previews) or more, got {every}")
    if edge and not LEAST_EDGE <= edge <= MOST_EDGE:
        allowed = f"0, or {LEAST_EDGE} to {MOST_EDGE}"
        raise InvalidParameter("options.preview_max_edge", f"preview_max_edge must be {allowed}, got {edge}")
    known: tuple[PreviewDecoder, ...] = get_args(PreviewDecoder)
    chosen = next((each for each in known if each == (decoder or "linear")), None)
    if chosen is None:
        allowed = " or ".join(known)
        raise InvalidParameter("options.preview_decoder", f"preview_decoder must be {allowed}, got {decoder!r}")
    return PreviewOptions(every=every, max_edge=edge or PREVIEW_EDGE, decoder=chosen) if every else None


def chunk_bytes(options: pb.StreamOptions) -> int:
    """How much of a file one message of a stream may hold.

    Raises:
        InvalidParameter: the client asks for more or less than is allowed.
    """
    asked = options.chunk_bytes or CHUNK_BYTES
    if not LEAST_CHUNK_BYTES <= asked <= MOST_CHUNK_BYTES:
        allowed = f"0, or {LEAST_CHUNK_BYTES} to {MOST_CHUNK_BYTES}"
        raise InvalidParameter("options.chunk_bytes", f"chunk_bytes must be {allowed}, got {asked}")
    return asked


def stream_warnings(options: pb.StreamOptions) -> list[pb.Warning]:
    """What a client should know of the options that have no effect."""
    if options.preview_every_n_steps:
        return []
    asked = [field.name for field, _ in options.ListFields() if field.name.startswith("preview_")]
    text = "{} has no effect without preview_every_n_steps"
    return [pb.Warning(code="parameter_ignored", message=text.format(name), param=f"options.{name}") for name in asked]


def id_of(given: str, in_metadata: str) -> str:
    """A new id, which begins with the one that the client gave.

    Args:
        given: in the message.
        in_metadata: else this one counts, if it is of the same form.

    Raises:
        InvalidParameter: the id in the message is of another form.
    """
    if given and not ID.fullmatch(given):
        raise InvalidParameter("request_id", "request_id must be 1 to 64 of the characters A-Z a-z 0-9 _ . -")
    return new_id(given or in_metadata)


def _body(params: pb.GenerationParams, task: Task) -> dict[str, Any]:
    """REST's body. All types are those of JSON, as REST is strict about them."""
    body = {field.name: _plain(value) for field, value in params.ListFields() if field.name != "task"}
    if "extra" in body:
        body["extra_params"] = {name: _json(value) for name, value in sorted(body.pop("extra").items())}
    if "inputs" in body:
        body |= _media(body.pop("inputs"), VIDEO_FIELDS if makes_video(task) else EDIT_FIELDS)
    if "loras" in body:
        body["loras"] = [{field.name: value for field, value in lora.ListFields()} for lora in params.loras]
    if params.HasField("width") != params.HasField("height"):
        one, other = ("width", "height") if params.HasField("width") else ("height", "width")
        raise InvalidParameter(other, f"{other} is required with {one}", "missing_required_parameter")
    if params.HasField("width"):
        body["size"] = f"{body.pop('width')}x{body.pop('height')}"
    if "output_quality" in body:
        body["output_compression"] = body.pop("output_quality")
    if "fps" in body and params.fps.is_integer():
        body["fps"] = int(params.fps)
    if makes_video(task) and body.get("output_format") == "mp4":
        del body["output_format"]  # it is the only one
    return body


def _kind(task: Task, begins_with: bool) -> type[ImageGenerationBody | VideoGenerationBody]:
    """REST's body of what is asked for."""
    if makes_video(task):
        return VideoGenerationBody
    return ImageEditBody if begins_with else ImageGenerationBody


def _media(inputs: list[pb.MediaInput], fields: dict[str, str]) -> dict[str, Any]:
    """The bytes of the inputs, by the fields of REST's body.

    Raises:
        InvalidParameter: an input has another role, or that of another one, or is not in the message.
    """
    found: dict[str, Any] = {}
    for number, given in enumerate(inputs):
        name, field = f"inputs[{number}]", fields.get(given.role)
        several = field == "image"
        if field is None or (field in found and not several):
            allowed = ", ".join(fields)
            raise InvalidParameter(f"{name}.role", f"role must be one of {allowed}, each once, got {given.role!r}")
        if given.WhichOneof("source") == "output_of_job":
            raise InvalidParameter(f"{name}.output_of_job", "output_of_job is not supported yet", "unknown_parameter")
        try:
            data = from_data_url(given.uri) if given.uri else given.data
        except ValueError as error:
            raise InvalidParameter(f"{name}.uri", f"uri {error}") from None
        found[field] = [*found.get(field, []), data] if several else data
    return found


def _json(value: Any) -> Any:
    """A value of a Struct, whose numbers are all doubles, as JSON tells it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _plain(value: Any) -> Any:
    return list(value) if hasattr(value, "append") else value


def _task(params: pb.GenerationParams, model: ModelSpec, streams: bool) -> Task:
    """What to make.

    Raises:
        InvalidParameter: the model cannot, or the RPC does not.
    """
    able = model.tasks or tuple(TASKS.values())
    roles = [each.role for each in params.inputs]
    if params.task and params.task not in TASKS:
        known = ", ".join(map(pb.Task.Name, TASKS))
        raise InvalidParameter("task", f"task {params.task} is not supported yet; supported: {known}", "wrong_task")
    asked = TASKS.get(params.task)
    videos = makes_video(asked) if asked else all(makes_video(each) for each in able)
    meant = tasks_of(roles, videos)
    task = asked or next((each for each in meant if each in able), meant[0])
    if task not in able:
        said = f"{model.name!r} is not for {task}; it is for {', '.join(able)}"
        raise InvalidParameter("task", said, "wrong_task")
    if task not in meant:
        got = ", ".join(roles) or "none"
        raise InvalidParameter("inputs", f"the inputs do not make a task {task}: their roles are {got}")
    if videos and not streams:
        raise InvalidParameter("task", "GenerateImage makes no videos; call GenerateStream", "wrong_task")
    return task


@contextlib.contextmanager
def in_message() -> Iterator[None]:
    """Errors about a field of a body become those about a field of `params`."""
    try:
        yield
    except InvalidParameter as error:
        if error.param is None:
            raise
        if error.param == "partial_images":  # what asks for previews in REST
            raise InvalidParameter(EVERY, error.message, error.code) from None
        name = OTHER_NAMES.get(error.param.partition(".")[0], error.param)
        message = error.message
        if name in ("output_quality", "extra"):
            message = message.replace("output_compression", name).replace("extra_params", name)
        if error.code == "unknown_parameter":
            message = f"{name} is not supported for this task"
        raise InvalidParameter(f"params.{name}", message, error.code) from None
    except ModelNotFound as error:
        error.param = "params.model"
        raise


def _reject_newer(message: Message, path: str) -> None:
    """Reject a field that this version of the contract does not have, at any depth.

    Raises:
        InvalidParameter: there is one.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        where = path or "the message"
        raise InvalidParameter(
            path or None,
            f"{where} has a field with the number {unknown[0].field_number}, which this server does not know",
            "unknown_parameter",
        )
    for field, value in message.ListFields():
        kind = field.message_type
        if kind is not None and kind.file.name == pb.DESCRIPTOR.name and not kind.GetOptions().map_entry:
            for part in [value] if isinstance(value, Message) else value:
                _reject_newer(part, f"{path}.{field.name}" if path else field.name)
