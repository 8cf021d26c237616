import datetime

from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Task(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_UNSPECIFIED: _ClassVar[Task]
    TASK_TEXT_TO_IMAGE: _ClassVar[Task]
    TASK_IMAGE_TO_IMAGE: _ClassVar[Task]
    TASK_TEXT_TO_VIDEO: _ClassVar[Task]
    TASK_IMAGE_TO_VIDEO: _ClassVar[Task]
    TASK_INPAINT: _ClassVar[Task]
    TASK_EDIT: _ClassVar[Task]
    TASK_CONTROL: _ClassVar[Task]
    TASK_FIRST_LAST_FRAME_TO_VIDEO: _ClassVar[Task]
    TASK_VIDEO_TO_VIDEO: _ClassVar[Task]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_SUCCEEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]
    JOB_STATE_EXPIRED: _ClassVar[JobState]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_STANDARD: _ClassVar[Priority]
    PRIORITY_BATCH: _ClassVar[Priority]
TASK_UNSPECIFIED: Task
TASK_TEXT_TO_IMAGE: Task
TASK_IMAGE_TO_IMAGE: Task
TASK_TEXT_TO_VIDEO: Task
TASK_IMAGE_TO_VIDEO: Task
TASK_INPAINT: Task
TASK_EDIT: Task
TASK_CONTROL: Task
TASK_FIRST_LAST_FRAME_TO_VIDEO: Task
TASK_VIDEO_TO_VIDEO: Task
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_SUCCEEDED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
JOB_STATE_EXPIRED: JobState
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_STANDARD: Priority
PRIORITY_BATCH: Priority

class MediaInput(_message.Message):
    __slots__ = ("data", "uri", "output_of_job", "mime_type", "role")
    DATA_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_OF_JOB_FIELD_NUMBER: _ClassVar[int]
    MIME_TYPE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    uri: str
    output_of_job: str
    mime_type: str
    role: str
    def __init__(self, data: _Optional[bytes] = ..., uri: _Optional[str] = ..., output_of_job: _Optional[str] = ..., mime_type: _Optional[str] = ..., role: _Optional[str] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("name", "scale")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    name: str
    scale: float
    def __init__(self, name: _Optional[str] = ..., scale: _Optional[float] = ...) -> None: ...

class GenerationParams(_message.Message):
    __slots__ = ("model", "task", "prompt", "negative_prompt", "inputs", "n", "width", "height", "num_inference_steps", "guidance_scale", "guidance_scale_2", "true_cfg_scale", "flow_shift", "boundary_ratio", "strength", "seed", "num_frames", "fps", "loras", "output_format", "output_quality", "extra", "seeds", "embed_metadata")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_2_FIELD_NUMBER: _ClassVar[int]
    TRUE_CFG_SCALE_FIELD_NUMBER: _ClassVar[int]
    FLOW_SHIFT_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_RATIO_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_QUALITY_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    EMBED_METADATA_FIELD_NUMBER: _ClassVar[int]
    model: str
    task: Task
    prompt: str
    negative_prompt: str
    inputs: _containers.RepeatedCompositeFieldContainer[MediaInput]
    n: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float
    true_cfg_scale: float
    flow_shift: float
    boundary_ratio: float
    strength: float
    seed: int
    num_frames: int
    fps: float
    loras: _containers.RepeatedCompositeFieldContainer[Lora]
    output_format: str
    output_quality: int
    extra: _struct_pb2.Struct
    seeds: _containers.RepeatedScalarFieldContainer[int]
    embed_metadata: bool
    def __init__(self, model: _Optional[str] = ..., task: _Optional[_Union[Task, str]] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[MediaInput, _Mapping]]] = ..., n: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., num_inference_steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., guidance_scale_2: _Optional[float] = ..., true_cfg_scale: _Optional[float] = ..., flow_shift: _Optional[float] = ..., boundary_ratio: _Optional[float] = ..., strength: _Optional[float] = ..., seed: _Optional[int] = ..., num_frames: _Optional[int] = ..., fps: _Optional[float] = ..., loras: _Optional[_Iterable[_Union[Lora, _Mapping]]] = ..., output_format: _Optional[str] = ..., output_quality: _Optional[int] = ..., extra: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., seeds: _Optional[_Iterable[int]] = ..., embed_metadata: _Optional[bool] = ...) -> None: ...

class Scheduling(_message.Message):
    __slots__ = ("priority", "deadline_seconds")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    priority: Priority
    deadline_seconds: float
    def __init__(self, priority: _Optional[_Union[Priority, str]] = ..., deadline_seconds: _Optional[float] = ...) -> None: ...

class Warning(_message.Message):
    __slots__ = ("code", "message", "param")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...

class StreamOptions(_message.Message):
    __slots__ = ("preview_every_n_steps", "preview_max_edge", "chunk_bytes", "preview_decoder")
    PREVIEW_EVERY_N_STEPS_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_MAX_EDGE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_DECODER_FIELD_NUMBER: _ClassVar[int]
    preview_every_n_steps: int
    preview_max_edge: int
    chunk_bytes: int
    preview_decoder: str
    def __init__(self, preview_every_n_steps: _Optional[int] = ..., preview_max_edge: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., preview_decoder: _Optional[str] = ...) -> None: ...

class OutputHeader(_message.Message):
    __slots__ = ("index", "mime_type", "total_bytes", "sha256", "seed", "width", "height", "num_frames", "fps")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    MIME_TYPE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    index: int
    mime_type: str
    total_bytes: int
    sha256: str
    seed: int
    width: int
    height: int
    num_frames: int
    fps: float
    def __init__(self, index: _Optional[int] = ..., mime_type: _Optional[str] = ..., total_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., seed: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., num_frames: _Optional[int] = ..., fps: _Optional[float] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: OutputHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[OutputHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class OutputChunk(_message.Message):
    __slots__ = ("index", "offset", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    offset: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("step", "total_steps", "eta_seconds", "stage", "step_seconds")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    ETA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    step: int
    total_steps: int
    eta_seconds: float
    stage: str
    step_seconds: float
    def __init__(self, step: _Optional[int] = ..., total_steps: _Optional[int] = ..., eta_seconds: _Optional[float] = ..., stage: _Optional[str] = ..., step_seconds: _Optional[float] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("position", "eta_seconds", "state", "reason", "waiting")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ETA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    position: int
    eta_seconds: float
    state: str
    reason: str
    waiting: int
    def __init__(self, position: _Optional[int] = ..., eta_seconds: _Optional[float] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., waiting: _Optional[int] = ...) -> None: ...

class Preview(_message.Message):
    __slots__ = ("index", "step", "mime_type", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MIME_TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    step: int
    mime_type: str
    data: bytes
    def __init__(self, index: _Optional[int] = ..., step: _Optional[int] = ..., mime_type: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Metrics(_message.Message):
    __slots__ = ("queue_seconds", "generate_seconds", "stage_seconds", "peak_memory_mb", "replica", "layout", "step_seconds")
    class StageSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GENERATE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STAGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_MB_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    generate_seconds: float
    stage_seconds: _containers.ScalarMap[str, float]
    peak_memory_mb: float
    replica: str
    layout: str
    step_seconds: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, queue_seconds: _Optional[float] = ..., generate_seconds: _Optional[float] = ..., stage_seconds: _Optional[_Mapping[str, float]] = ..., peak_memory_mb: _Optional[float] = ..., replica: _Optional[str] = ..., layout: _Optional[str] = ..., step_seconds: _Optional[_Iterable[float]] = ...) -> None: ...

class JobError(_message.Message):
    __slots__ = ("code", "message", "param")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "state", "params", "progress", "error", "outputs", "metrics", "create_time", "start_time", "finish_time", "expire_time", "labels", "warnings", "attempt", "scheduling", "position")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    FINISH_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    id: str
    state: JobState
    params: GenerationParams
    progress: Progress
    error: JobError
    outputs: _containers.RepeatedCompositeFieldContainer[OutputHeader]
    metrics: Metrics
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    finish_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    labels: _containers.ScalarMap[str, str]
    warnings: _containers.RepeatedCompositeFieldContainer[Warning]
    attempt: int
    scheduling: Scheduling
    position: int
    def __init__(self, id: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., params: _Optional[_Union[GenerationParams, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., error: _Optional[_Union[JobError, _Mapping]] = ..., outputs: _Optional[_Iterable[_Union[OutputHeader, _Mapping]]] = ..., metrics: _Optional[_Union[Metrics, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., finish_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., warnings: _Optional[_Iterable[_Union[Warning, _Mapping]]] = ..., attempt: _Optional[int] = ..., scheduling: _Optional[_Union[Scheduling, _Mapping]] = ..., position: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("id", "tasks", "defaults", "replicas_ready", "gpus_per_replica", "state", "reason", "aliases", "layout", "loras", "limits")
    ID_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_READY_FIELD_NUMBER: _ClassVar[int]
    GPUS_PER_REPLICA_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    id: str
    tasks: _containers.RepeatedScalarFieldContainer[Task]
    defaults: GenerationParams
    replicas_ready: int
    gpus_per_replica: int
    state: str
    reason: str
    aliases: _containers.RepeatedScalarFieldContainer[str]
    layout: str
    loras: _containers.RepeatedScalarFieldContainer[str]
    limits: GenerationLimits
    def __init__(self, id: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[Task, str]]] = ..., defaults: _Optional[_Union[GenerationParams, _Mapping]] = ..., replicas_ready: _Optional[int] = ..., gpus_per_replica: _Optional[int] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., layout: _Optional[str] = ..., loras: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[GenerationLimits, _Mapping]] = ...) -> None: ...

class GenerationLimits(_message.Message):
    __slots__ = ("max_width", "max_height", "size_multiple", "max_num_inference_steps", "max_num_frames", "max_n", "max_work")
    MAX_WIDTH_FIELD_NUMBER: _ClassVar[int]
    MAX_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    SIZE_MULTIPLE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_N_FIELD_NUMBER: _ClassVar[int]
    MAX_WORK_FIELD_NUMBER: _ClassVar[int]
    max_width: int
    max_height: int
    size_multiple: int
    max_num_inference_steps: int
    max_num_frames: int
    max_n: int
    max_work: int
    def __init__(self, max_width: _Optional[int] = ..., max_height: _Optional[int] = ..., size_multiple: _Optional[int] = ..., max_num_inference_steps: _Optional[int] = ..., max_num_frames: _Optional[int] = ..., max_n: _Optional[int] = ..., max_work: _Optional[int] = ...) -> None: ...

class GenerateImageRequest(_message.Message):
    __slots__ = ("params", "request_id", "scheduling")
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    params: GenerationParams
    request_id: str
    scheduling: Scheduling
    def __init__(self, params: _Optional[_Union[GenerationParams, _Mapping]] = ..., request_id: _Optional[str] = ..., scheduling: _Optional[_Union[Scheduling, _Mapping]] = ...) -> None: ...

class GenerateImageResponse(_message.Message):
    __slots__ = ("outputs", "metrics", "warnings")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    metrics: Metrics
    warnings: _containers.RepeatedCompositeFieldContainer[Warning]
    def __init__(self, outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ..., metrics: _Optional[_Union[Metrics, _Mapping]] = ..., warnings: _Optional[_Iterable[_Union[Warning, _Mapping]]] = ...) -> None: ...

class GenerateStreamRequest(_message.Message):
    __slots__ = ("params", "request_id", "options", "scheduling")
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    params: GenerationParams
    request_id: str
    options: StreamOptions
    scheduling: Scheduling
    def __init__(self, params: _Optional[_Union[GenerationParams, _Mapping]] = ..., request_id: _Optional[str] = ..., options: _Optional[_Union[StreamOptions, _Mapping]] = ..., scheduling: _Optional[_Union[Scheduling, _Mapping]] = ...) -> None: ...

class GenerateStreamResponse(_message.Message):
    __slots__ = ("accepted", "queued", "progress", "preview", "output_header", "output_chunk", "done", "restarted", "error")
    class Accepted(_message.Message):
        __slots__ = ("job_id",)
        JOB_ID_FIELD_NUMBER: _ClassVar[int]
        job_id: str
        def __init__(self, job_id: _Optional[str] = ...) -> None: ...
    class Done(_message.Message):
        __slots__ = ("metrics", "warnings")
        METRICS_FIELD_NUMBER: _ClassVar[int]
        WARNINGS_FIELD_NUMBER: _ClassVar[int]
        metrics: Metrics
        warnings: _containers.RepeatedCompositeFieldContainer[Warning]
        def __init__(self, metrics: _Optional[_Union[Metrics, _Mapping]] = ..., warnings: _Optional[_Iterable[_Union[Warning, _Mapping]]] = ...) -> None: ...
    class Restarted(_message.Message):
        __slots__ = ("attempt", "reason")
        ATTEMPT_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        attempt: int
        reason: str
        def __init__(self, attempt: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_HEADER_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_CHUNK_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    RESTARTED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    accepted: GenerateStreamResponse.Accepted
    queued: Queued
    progress: Progress
    preview: Preview
    output_header: OutputHeader
    output_chunk: OutputChunk
    done: GenerateStreamResponse.Done
    restarted: GenerateStreamResponse.Restarted
    error: JobError
    def __init__(self, accepted: _Optional[_Union[GenerateStreamResponse.Accepted, _Mapping]] = ..., queued: _Optional[_Union[Queued, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., preview: _Optional[_Union[Preview, _Mapping]] = ..., output_header: _Optional[_Union[OutputHeader, _Mapping]] = ..., output_chunk: _Optional[_Union[OutputChunk, _Mapping]] = ..., done: _Optional[_Union[GenerateStreamResponse.Done, _Mapping]] = ..., restarted: _Optional[_Union[GenerateStreamResponse.Restarted, _Mapping]] = ..., error: _Optional[_Union[JobError, _Mapping]] = ...) -> None: ...

class CreateJobRequest(_message.Message):
    __slots__ = ("params", "request_id", "webhook_url", "labels", "scheduling")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WEBHOOK_URL_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    params: GenerationParams
    request_id: str
    webhook_url: str
    labels: _containers.ScalarMap[str, str]
    scheduling: Scheduling
    def __init__(self, params: _Optional[_Union[GenerationParams, _Mapping]] = ..., request_id: _Optional[str] = ..., webhook_url: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., scheduling: _Optional[_Union[Scheduling, _Mapping]] = ...) -> None: ...

class CreateJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "state")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    state: JobState
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("id", "options")
    ID_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    id: str
    options: StreamOptions
    def __init__(self, id: _Optional[str] = ..., options: _Optional[_Union[StreamOptions, _Mapping]] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("job", "preview")
    JOB_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    job: Job
    preview: Preview
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ..., preview: _Optional[_Union[Preview, _Mapping]] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class DeleteJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DownloadOutputRequest(_message.Message):
    __slots__ = ("job_id", "index", "offset")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    index: int
    offset: int
    def __init__(self, job_id: _Optional[str] = ..., index: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class DownloadOutputResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: OutputHeader
    chunk: OutputChunk
    def __init__(self, header: _Optional[_Union[OutputHeader, _Mapping]] = ..., chunk: _Optional[_Union[OutputChunk, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...
