"""What gRPC refuses, and with which status, code and details."""

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc.code_pb2 import Code

from service.api import errors
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.rpc import statuses
from service.rpc.requests import MOST_CHUNK_BYTES
from tests.support.grpc_calls import OK, Answer, Backend, ask, image, params, stream
from workers.errors import OutOfMemory, QueueFull

REFUSED = [
    ({"prompt": ""}, "prompt", "missing_required_parameter"),
    ({"prompt": "  "}, "prompt", "invalid_value"),
    ({"prompt": "a" * 32_001}, "prompt", "invalid_value"),
    ({"width": 64}, "height", "missing_required_parameter"),
    ({"width": 63, "height": 64}, "width", "invalid_size"),
    ({"width": -64, "height": 64}, "width", "invalid_size"),
    ({"num_inference_steps": 101}, "num_inference_steps", "invalid_value"),
    ({"n": 5}, "n", "invalid_value"),
    ({"seed": -1}, "seed", "invalid_value"),
    ({"guidance_scale": "NaN"}, "guidance_scale", "invalid_value"),
    ({"output_format": "bmp"}, "output_format", "invalid_value"),
    ({"output_quality": 101}, "output_quality", "invalid_value"),
    ({"loras": [{"name": "nope"}]}, "loras", "invalid_value"),
    ({"loras": [{"name": "ink", "scale": 5}]}, "loras.0.scale", "invalid_value"),
    ({"task": "TASK_EDIT"}, "inputs", "invalid_value"),
    ({"task": 77}, "task", "wrong_task"),
    ({"model": "paint", "task": "TASK_TEXT_TO_VIDEO"}, "task", "wrong_task"),
    ({"model": "film", "task": "TASK_TEXT_TO_IMAGE"}, "task", "wrong_task"),
    ({"model": ""}, "model", "missing_required_parameter"),
    ({"guidance_scale_2": 1}, "guidance_scale_2", "invalid_value"),
    ({"seeds": [1, 2]}, "seeds", "invalid_value"),
    ({"guidance_scale": 2, "true_cfg_scale": 1}, "true_cfg_scale", "invalid_value"),
    ({"inputs": [{"role": "image", "uri": "https://example.org"}]}, "inputs[0].uri", "invalid_value"),
    ({"inputs": [{"role": "image", "output_of_job": "a"}]}, "inputs[0].output_of_job", "unknown_parameter"),
    ({"inputs": [{"role": "first_frame", "data": "YWI="}]}, "inputs[0].role", "invalid_value"),
    (
        {"inputs": [{"role": role, "data": "YWI="} for role in ("image", "mask", "mask")]},
        "inputs[2].role", "invalid_value",
    ),
    ({"inputs": [{"role": "last_image", "data": "YWI="}]}, "inputs[0].role", "invalid_value"),
    ({"inputs": [{"role": "mask", "data": "YWI="}]}, "inputs", "missing_required_parameter"),
    ({"inputs": [{"role": "image", "data": "YWI="}]}, "inputs", "invalid_picture"),
    ({"inputs": [{"role": "image", "data": "YWI="}], "task": "TASK_TEXT_TO_IMAGE"}, "inputs", "invalid_value"),
    ({"inputs": [{"role": "image", "data": "YWI="}], "task": "TASK_INPAINT"}, "inputs", "invalid_value"),
    ({"task": "TASK_IMAGE_TO_IMAGE"}, "inputs", "invalid_value"),
    ({"model": "paint", "inputs": [{"role": "image", "data": "YWI="}]}, "task", "wrong_task"),
    ({"inputs": [{"role": "image", "data": "YWI="}], "strength": 2}, "strength", "invalid_value"),
    ({"strength": 0.5}, "strength", "unknown_parameter"),
    ({"extra": {"a": {"b": 1}}}, "extra", "invalid_value"),
    ({"extra": {"a": None}}, "extra", "invalid_value"),
    *[
        ({name: value}, name, "unknown_parameter")
        for name, value in {
            "boundary_ratio": 0, "strength": 0,
            "num_frames": 5, "fps": 8,
        }.items()
    ],
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "code"), REFUSED)
@pytest.mark.parametrize("call", [image, stream])
def test_what_is_wrong_is_named(call: Callable[..., Answer], fields: dict[str, Any], param: str, code: str) -> None:
    backend = Backend()
    answer = call(backend, **fields)
    assert answer.code == grpc.StatusCode.INVALID_ARGUMENT, answer
    assert (answer.details["ErrorInfo"].reason, answer.details["ErrorInfo"].domain) == (code, "spray")
    (violation,) = answer.details["BadRequest"].field_violations
    assert (violation.field, violation.description) == (f"params.{param}", answer.said)
    assert "RetryInfo" not in answer.details
    assert backend.requests == []
    if call is stream:
        (event,) = answer.messages
        assert (event.error.code, event.error.param) == (code, f"params.{param}")


def test_what_a_video_does_not_have_is_named() -> None:
    for fields, param in (({"n": 2}, "n"), ({"output_format": "png"}, "output_format"), ({"fps": 8.5}, "fps")):
        answer = stream(Backend(), model="film", **fields)
        assert (answer.code, answer.messages[0].error.param) == (grpc.StatusCode.INVALID_ARGUMENT, f"params.{param}")


def test_a_field_of_a_newer_contract_is_refused_at_any_depth() -> None:
    newer = b"\xc0\x3e\x01"  # number 1000, 1
    backend = Backend()
    inner = pb.GenerateImageRequest(params=pb.GenerationParams.FromString(params().SerializeToString() + newer))
    outer = pb.GenerateImageRequest.FromString(pb.GenerateImageRequest(params=params()).SerializeToString() + newer)
    for request, where in ((inner, "params"), (outer, "the message")):
        answer = ask(backend, "GenerateImage", request)
        assert answer.code == grpc.StatusCode.INVALID_ARGUMENT
        assert answer.said.startswith(f"{where} has a field with the number 1000")
    assert backend.requests == []


def test_what_is_not_supported_besides_is_named() -> None:
    backend, urgent = Backend(), pb.Scheduling(priority=pb.PRIORITY_BATCH)
    answer = ask(backend, "GenerateImage", pb.GenerateImageRequest(params=params(), scheduling=urgent))
    assert (answer.code, answer.said[:19]) == (grpc.StatusCode.INVALID_ARGUMENT, "scheduling.priority")
    assert ask(backend, "GenerateImage", pb.GenerateImageRequest(params=params(), scheduling={})).code == OK
    for size in (-1, 1, MOST_CHUNK_BYTES + 1):
        answer = stream(backend, pb.StreamOptions(chunk_bytes=size))
        assert (answer.code, answer.messages[0].error.param) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "options.chunk_bytes",
        )


@pytest.mark.parametrize(
    ("prompt", "code", "reason", "retry"),
    [
        ("full", grpc.StatusCode.RESOURCE_EXHAUSTED, "queue_full", True),
        ("draining", grpc.StatusCode.UNAVAILABLE, "shutting_down", True),
        ("lost", grpc.StatusCode.ABORTED, "worker_lost", False),
        ("failed", grpc.StatusCode.INTERNAL, "generation_failed", False),
        ("big", grpc.StatusCode.RESOURCE_EXHAUSTED, "out_of_memory", False),
        ("bug", grpc.StatusCode.INTERNAL, "internal_error", False),
        ("later", grpc.StatusCode.ABORTED, "worker_lost", False),
    ],
)
@pytest.mark.parametrize("call", [image, stream])
def test_what_the_backend_raises_has_its_status(
    call: Callable[..., Answer], prompt: str, code: grpc.StatusCode, reason: str, retry: bool
) -> None:
    backend = Backend()
    backend.raises["big"] = OutOfMemory("too large", agreed=True)
    answer = call(backend, prompt=prompt)
    assert (answer.code, answer.details["ErrorInfo"].reason) == (code, reason)
    assert ("RetryInfo" in answer.details) == retry
    assert "secret" not in str(answer)
    if call is stream:
        events = [event.WhichOneof("event") for event in answer.messages]
        assert events == (["accepted", "progress", "error"] if prompt == "later" else ["error"])


@pytest.mark.parametrize(("known", "told"), [(None, 5), (41.5, 42), (9999.0, 120)])
def test_when_to_ask_again_is_said_as_over_rest(known: float | None, told: int) -> None:
    backend = Backend()
    backend.raises["full"] = QueueFull("too many requests wait", known)
    assert errors.answer(backend.raises["full"])[2] == {"retry-after": str(told)}
    assert image(backend, prompt="full").details["RetryInfo"].retry_delay.seconds == told


def test_every_error_has_a_status_of_grpc() -> None:
    for row in (*errors.STATUS.values(), errors.UNEXPECTED):
        assert grpc.StatusCode[row.grpc].value[0] == Code.Value(row.grpc)
        assert row.retry <= (row.grpc in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"))


@pytest.mark.parametrize("letter", ["a", "é", "文", "😀"])
def test_a_long_message_fits_into_a_status(letter: str) -> None:
    answer = image(Backend(), model=letter * 100_000)
    assert answer.code == grpc.StatusCode.NOT_FOUND
    assert 0.85 * statuses.LONGEST < len(quote(answer.said)) <= statuses.LONGEST
    assert letter in answer.said


def test_a_large_message_is_refused() -> None:
    backend = Backend()
    backend.max_body_bytes = 1024
    answer = image(backend, prompt="a" * 1024)
    assert (answer.code, answer.details["ErrorInfo"].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "body_too_large")
