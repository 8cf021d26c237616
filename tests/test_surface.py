"""What others build on, frozen: a change here is a change for them, and must be made on purpose."""

import dataclasses
import inspect
from typing import Any

import pytest
import typer
from fastapi.routing import iter_route_contexts
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel

import sp_core.hooks
import sp_core.parallelize
import sp_core.sp_plan
import sp_core.sp_sharding
from deploy.spec import DeploymentSpec
from service.api import errors as status
from service.api.bodies import ImageEditBody, ImageGenerationBody, VideoGenerationBody
from service.api.rest import rest_app
from service.cli import main as cli
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.state.model_states import STATES
from sp_core.attention.layer import SequenceParallelAttention
from sp_core.degrees import AXES, ParallelDegrees
from sp_core.lora import Adapters
from sp_core.mesh import ParallelMesh
from workers import errors, metrics

PLAN_API = {
    "SequenceParallelInput": ["split_dim", "expected_dims", "split_output", "auto_pad"],
    "OptionalSequenceParallelInput": ["split_dim", "expected_dims", "split_output", "auto_pad"],
    "SequenceParallelCompanion": [
        "split_dim",
        "expected_dims",
        "split_output",
        "auto_pad",
        "optional",
        "per_sample",
    ],
    "SequenceParallelPartialInput": ["split_dim", "text_len_source", "expected_dims", "split_output"],
    "SequenceParallelLeadingCount": ["stream"],
    "SequenceParallelGrid": [],
    "SequenceParallelConvolution": ["rows"],
    "SequenceParallelOutput": ["gather_dim", "expected_dims", "stream"],
}

FUNCTIONS = {
    sp_core.parallelize.parallelize: ["model", "mesh", "plan", "family", "dtype", "kernel"],
    sp_core.hooks.apply_sequence_parallel: ["model", "plan", "mesh"],
    sp_core.sp_plan.validate_sp_plan: ["plan"],
    sp_core.sp_plan.get_sp_plan_from_model: ["model"],
    sp_core.sp_sharding.sp_active: [],
    sp_core.sp_sharding.sp_shard: ["tensor", "dim", "companion"],
    sp_core.sp_sharding.sp_gather: ["tensor", "dim", "stream", "closes"],
    SequenceParallelAttention.__init__: ["self", "scale", "local"],
    SequenceParallelAttention.forward: [
        "self", "query", "key", "value", "mask", "joint_query", "joint_key", "joint_value", "joint_strategy",
        "joint_sharded",
    ],
    ParallelMesh.create: ["degrees", "device_type", "timeout_s", "control_timeout_s", "smaller"],
    Adapters.load: ["self", "name", "weights"],
    Adapters.unload: ["self", "name"],
    Adapters.activate: ["self", "scales"],
}  # fmt: skip

DEGREES = ["ulysses_degree", "ring_degree", "tensor_parallel_size", "cfg_parallel_size"]

SPEC_KEYS = frozenset(
    """
    models models.name models.source models.device models.dtype models.parallel
    models.parallel.ulysses_degree models.parallel.ring_degree models.parallel.tensor_parallel_size
    models.parallel.cfg_parallel_size
    models.defaults models.defaults.width models.defaults.height models.defaults.num_inference_steps
    models.defaults.guidance_scale models.defaults.guidance_scale_2 models.defaults.num_frames models.defaults.fps
    models.limits models.limits.max_width models.limits.max_height models.limits.size_multiple
    models.limits.max_num_inference_steps models.limits.max_num_frames models.limits.max_n
    models.limits.max_work models.max_queued models.max_queued_s models.grace_period_s models.revision
    models.aliases models.tasks models.plan models.transformer_class models.env
    models.autoscaling models.autoscaling.min_replicas models.autoscaling.max_replicas
    models.autoscaling.target_backlog_seconds models.autoscaling.upscale_delay_s
    models.autoscaling.downscale_delay_s models.autoscaling.downscale_to_zero_delay_s
    models.attention_kernel models.vae_dtype models.placement.network_interface
    models.compile models.cuda_graphs models.warmup_shapes models.warmup_shapes.width models.warmup_shapes.height
    models.warmup_shapes.num_frames models.text_encoder models.vae models.vae_tiling_above
    models.batch_guidance models.self_test models.spare_ranks models.elastic models.elastic.min_degree
    models.digest models.loras models.loras.name models.loras.source models.loras.component models.loras.digest
    models.placement models.placement.cpus_per_rank models.placement.strategy models.placement.accelerator_type
    models.placement.node_labels models.placement.memory
    models.timeouts models.timeouts.startup_s models.timeouts.phase_s models.timeouts.ping_s
    gateway gateway.host gateway.port gateway.grpc_port gateway.replicas gateway.cors_origins gateway.media_hosts
    gateway.public_url gateway.node_labels gateway.log_format gateway.log_prompts
    gateway.webhook_hosts gateway.webhook_key_env
    limits limits.max_body_bytes metrics metrics.host metrics.port tracing tracing.otlp_endpoint tracing.sample_ratio
    storage storage.models storage.compiled storage.outputs storage.outputs.folder storage.outputs.ttl_s
    storage.outputs.url storage.outputs.max_bytes
    storage.idempotency storage.idempotency.folder storage.idempotency.ttl_s storage.idempotency.max_bytes
    storage.jobs storage.jobs_url_env
    auth auth.api_keys_env auth.api_keys_file auth.insecure
    """.split()
)

ROUTES = frozenset(
    {
        "GET /docs",
        "GET /health",
        "GET /livez",
        "GET /openapi.json",
        "GET /readyz",
        "GET /v1/cluster",
        "POST /v1/profiles",
        "GET /v1/models",
        "GET /v1/requests",
        "GET /v1/requests/{id}",
        "DELETE /v1/requests/{id}",
        "GET /v1/outputs/{name}",
        "HEAD /v1/outputs/{name}",
        "GET /v1/models/{name:path}",
        "POST /v1/images/edits",
        "POST /v1/images/generations",
        "POST /v1/videos/sync",
        "GET /v1/videos",
        "POST /v1/videos",
        "GET /v1/videos/{video_id}",
        "DELETE /v1/videos/{video_id}",
        "GET /v1/videos/{video_id}/content",
        "POST /v1/videos/{video_id}/cancel",
        "POST /v1/videos/{video_id}/remix",
        "GET /v1/videos/{video_id}/events",
        "GET /v1/jobs",
        "GET /v1/jobs/{job_id}",
        "DELETE /v1/jobs/{job_id}",
        "GET /v1/jobs/{job_id}/content",
        "GET /v1/jobs/{job_id}/events",
        "POST /v1/jobs/{job_id}/cancel",
    }
)

RPCS = frozenset(
    """
    GenerateImage GenerateStream ListModels
    CreateJob GetJob ListJobs WatchJob CancelJob DeleteJob DownloadOutput
    """.split()
)

EVENTS = {
    "accepted": 1, "queued": 2, "progress": 3, "preview": 4, "output_header": 5, "output_chunk": 6, "done": 7,
    "restarted": 8, "error": 9,
}  # fmt: skip

PARAMS = {
    "model": 1, "task": 2, "prompt": 3, "negative_prompt": 4, "inputs": 5, "n": 6, "width": 7, "height": 8,
    "num_inference_steps": 9, "guidance_scale": 10, "guidance_scale_2": 11, "true_cfg_scale": 12, "flow_shift": 13,
    "boundary_ratio": 14, "strength": 15, "seed": 16, "num_frames": 17, "fps": 18, "loras": 19, "output_format": 20,
    "output_quality": 21, "extra": 22, "seeds": 23, "embed_metadata": 24,
}  # fmt: skip

FIELDS = frozenset(
    """
    prompt model n size response_format stream stream_options partial_images quality user safety_identifier extra_body
    negative_prompt num_inference_steps guidance_scale guidance_scale_2 true_cfg_scale flow_shift seed loras lora
    width height num_outputs_per_prompt extra_params embed_metadata
    generator_device enable_teacache vae_use_slicing vae_use_tiling return_stage_metrics enhance_prompt bot_task
    perf_dump_path output_path
    """.split()
)
IMAGE_FIELDS = FIELDS | {
    "seeds", "output_format", "output_compression", "background", "style", "moderation", "priority", "deadline_s",
    "webhook_url"
}  # fmt: skip
EDIT_FIELDS = IMAGE_FIELDS | {
    "image", "images", "mask", "mask_image", "control_image", "strength", "input_fidelity"
}  # fmt: skip
VIDEO_FIELDS = FIELDS | {"num_frames", "seconds", "fps", "input_reference", "image", "last_image", "video", "strength"}

METRICS = {
    "spray_step_seconds": {"model", "replica", "rank", "layout", "shape"},
    "spray_collective_seconds": {"model", "replica", "rank", "op"},
    "spray_collective_bytes": {"model", "replica", "rank", "op"},
    "spray_straggler_seconds": {"model", "replica", "rank"},
    "spray_rank_idle_seconds": {"model", "replica"},
    "spray_elastic_changes": {"model", "replica", "kind"},
    "spray_stage_seconds": {"model", "replica", "rank", "stage"},
    "spray_steps": {"model", "replica"},
    "spray_pixels": {"model", "replica"},
    "spray_prompt_tokens": {"model", "replica"},
    "spray_rank_memory_bytes": {"model", "replica", "rank", "kind"},
    "spray_gang_start_seconds": {"model", "phase"},
    "spray_jobs": {"model", "state"},
    "spray_jobs_ended": {"model", "state"},
    "spray_webhooks": {"outcome"},
    "spray_job_store_seconds": {"operation"},
    "spray_job_store_errors": {"operation"},
    "spray_gang_restarts": {"model", "reason"},
    "spray_backlog_seconds": {"model", "replica"},
    "spray_capacity_seconds": {"model", "replica"},
    "spray_progress_timestamp_seconds": {"model", "replica"},
    "spray_requests": {"model", "outcome"},
    "spray_request_seconds": {"model"},
    "spray_request_losses": {"model"},
    "spray_requests_in_flight": {"model"},
    "spray_requests_queued": {"model"},
    "spray_gangs": {"model", "state"},
    "spray_gangs_wanted": {"model", "reason"},
    "spray_gangs_limit": {"model", "bound"},
    "spray_target_backlog_seconds": {"model"},
    "spray_api_requests": {"route", "code", "key"},
    "spray_api_seconds": {"route"},
    "spray_disk_free_bytes": {"folder"},
    "spray_disk_size_bytes": {"folder"},
    "spray_build_info": {"version"},
}

MODEL_STATES = {"running", "starting", "waiting", "asleep", "failed"}

ERRORS = {
    "InvalidParameter": (400, "invalid_value", "INVALID_ARGUMENT"),
    "BodyTimeout": (408, "body_timeout", "DEADLINE_EXCEEDED"),
    "BodyTooLarge": (413, "body_too_large", "INVALID_ARGUMENT"),
    "OutputNotFound": (404, "output_not_found", "NOT_FOUND"),
    "InputNotFound": (404, "input_not_found", "NOT_FOUND"),
    "RequestNotFound": (404, "request_not_found", "NOT_FOUND"),
    "Unauthorized": (401, "invalid_api_key", "UNAUTHENTICATED"),
    "Forbidden": (403, "forbidden", "PERMISSION_DENIED"),
    "ModelNotAllowed": (403, "model_not_allowed", "PERMISSION_DENIED"),
    "AdminOnly": (403, "admin_only", "PERMISSION_DENIED"),
    "RateLimited": (429, "rate_limit_exceeded", "RESOURCE_EXHAUSTED"),
    "UnsupportedMediaType": (415, "unsupported_media_type", "INVALID_ARGUMENT"),
    "ModelNotFound": (404, "model_not_found", "NOT_FOUND"),
    "JobNotFound": (404, "job_not_found", "NOT_FOUND"),
    "JobNotReady": (409, "job_not_ready", "FAILED_PRECONDITION"),
    "RequestQuarantined": (422, "request_quarantined", "FAILED_PRECONDITION"),
    "IdempotencyKeyReused": (422, "idempotency_key_reuse", "ALREADY_EXISTS"),
    "GatewaySilent": (503, "gateway_lost", "UNAVAILABLE"),
    "KeysUnavailable": (503, "idempotency_unavailable", "UNAVAILABLE"),
    "QueueFull": (429, "queue_full", "RESOURCE_EXHAUSTED"),
    "RequestCancelled": (499, "cancelled", "CANCELLED"),
    "DeadlineExceeded": (504, "deadline_exceeded", "DEADLINE_EXCEEDED"),
    "RequestFailed": (500, "generation_failed", "INTERNAL"),
    "OutOfMemory": (400, "out_of_memory", "RESOURCE_EXHAUSTED"),
    "ShuttingDown": (503, "shutting_down", "UNAVAILABLE"),
    "ModelUnavailable": (503, "model_unavailable", "UNAVAILABLE"),
    "JobsUnavailable": (503, "jobs_unavailable", "UNAVAILABLE"),
    "OutputsFull": (507, "outputs_full", "RESOURCE_EXHAUSTED"),
    "OutputsUnavailable": (503, "outputs_unavailable", "UNAVAILABLE"),
    "GangLost": (503, "worker_lost", "ABORTED"),
}

VIDEO_FLAGS = {
    "prompt", "image", "last_image", "video", "strength", "output",
    "negative_prompt", "size", "width", "height", "num_inference_steps", "guidance_scale",
    "guidance_scale_2", "num_frames", "fps", "seed", "lora", "json", "previews", "detach", "server", "local", "model",
    "webhook", "device", "embed_metadata", "wait", *DEGREES,
}  # fmt: skip

PICTURE_FLAGS = {"n", "mask", "control_image"}

COMMANDS = {
    "check": {"file", "set", "gpus", "gpus_per_node", "cpus", "memory", "print_config"},
    "serve": {"file", "set", "port"},
    "build": {"file", "set"},
    "deploy": {"file", "set", "address", "prune", "dry_run", "allow_downtime", "allow_pending"},
    "ps": {"server", "json"},
    "top": {"server", "seconds"},
    "models": {"server", "supported", "json"},
    "requests": {"server", "json"},
    "cancel": {"request_id", "server"},
    "jobs": {"limit", "server", "json"},
    "job": {"job_id", "wait", "server", "json"},
    "download": {"job_id", "output", "wait", "server"},
    "doctor": {"file", "set"},
    "schema": {"model", "server"},
    "key": {"name", "admin"},
    "verify": {"target", "config", "world", "device"},
    "plan": {"target", "config", "world"},
    "bench": {
        "rate", "concurrency", "mix", "trace", "duration", "requests", "warmup", "seed", "slo", "timeout", "model",
        "prompt", "json", "plot", "server",
    },
    "profile": {"model", "steps", "width", "height", "num_frames", "output", "server"},
    "generate": VIDEO_FLAGS | PICTURE_FLAGS,
    "edit": VIDEO_FLAGS - {"num_frames", "fps", "guidance_scale_2", "last_image", "video"} | PICTURE_FLAGS,
    "video": VIDEO_FLAGS,
}  # fmt: skip


def test_plan_api() -> None:
    for name, fields in PLAN_API.items():
        kind = getattr(sp_core.sp_plan, name)
        assert [field.name for field in dataclasses.fields(kind)] == fields
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(*fields), (*fields, "other")[0], 3)


def test_functions() -> None:
    for function, parameters in FUNCTIONS.items():
        assert list(inspect.signature(function).parameters) == parameters


def test_degrees_and_axes() -> None:
    assert [field.name for field in dataclasses.fields(ParallelDegrees)] == DEGREES
    assert AXES == ("cfg", "ring", "ulysses", "tp")


def test_spec_keys() -> None:
    assert set(_keys(DeploymentSpec)) == SPEC_KEYS


def test_rest_routes_and_fields() -> None:
    routes = iter_route_contexts(rest_app(None).routes)  # type: ignore[arg-type]
    found = {f"{method} {route.path}" for route in routes for method in route.methods or ()}
    assert found == ROUTES
    assert set(ImageGenerationBody.model_fields) == IMAGE_FIELDS
    assert set(ImageEditBody.model_fields) == EDIT_FIELDS
    assert set(VideoGenerationBody.model_fields) == VIDEO_FIELDS
    assert set(STATES) == MODEL_STATES


def test_grpc() -> None:
    """Names may be added, with new numbers."""
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    assert service.full_name == "mediagen.v1.MediaGenerationService"
    assert set(service.methods_by_name) == RPCS
    for message, numbers in ((pb.GenerateStreamResponse, EVENTS), (pb.GenerationParams, PARAMS)):
        assert {field.name: field.number for field in message.DESCRIPTOR.fields} == numbers


def test_every_error_has_its_row() -> None:
    assert {kind.__name__: (row.http, row.code, row.grpc) for kind, row in status.STATUS.items()} == ERRORS
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, errors.SprayError) and not kind.__subclasses__():
            rows = [base for base in kind.__mro__ if base in status.STATUS]
            assert rows, f"{kind.__name__} has no row in service.api.errors"


def test_commands() -> None:
    group: Any = typer.main.get_command(cli.app)
    found = {
        name: {parameter.opts[0].removeprefix("--").replace("-", "_") for parameter in command.params}
        for name, command in group.commands.items()
    }
    assert found == COMMANDS


def _keys(section: Any, prefix: str = "") -> list[str]:
    """Dotted keys of a schema, through its nested sections."""
    keys = []
    if isinstance(section, type) and issubclass(section, BaseModel):
        fields = {name: field.annotation for name, field in section.model_fields.items()}
    elif dataclasses.is_dataclass(section):
        fields = {field.name: field.type for field in dataclasses.fields(section)}
    else:
        return []
    for name, annotation in fields.items():
        inner = next((a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)), annotation)
        keys += [prefix + name, *_keys(inner, f"{prefix}{name}.")]
    return keys


def test_metrics() -> None:
    defined = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
    assert {metric._name: set(metric._labelnames) for metric in defined} == METRICS
