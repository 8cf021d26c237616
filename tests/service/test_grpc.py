"""gRPC alone, without Ray, over grpc's own server: what is accepted, what is refused and how, health, who may call."""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import random
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2 as kinds
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from service.api import errors
from service.api.backend import Report, Restarted, Waiting
from service.api.reading import MAX_TEXT_BYTES
from service.api.schemas import ImageGenerationBody, VideoGenerationBody, find_model, to_request
from service.gateway import Gateway
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services
from service.rpc import health, statuses
from service.rpc.answers import model_message
from service.rpc.methods import GrpcMethods, _taken_on
from service.rpc.requests import MOST_CHUNK_BYTES, to_generation
from service.state.model_states import ModelState
from sp_core.degrees import ParallelDegrees
from tests.support.backend import FakeBackend, a_model
from tests.support.hostile import colored
from tests.support.hostile import file as encoded
from workers.errors import InvalidParameter, OutOfMemory, QueueFull
from workers.messages import GenerationRequest, GenerationResult, StepEvent

OK = grpc.StatusCode.OK
DETAILS = (kinds.ErrorInfo, kinds.BadRequest, kinds.RetryInfo)


class Backend(FakeBackend, GrpcMethods):
    """The methods of the gateway in front of the backend of the tests."""


@dataclasses.dataclass
class Answer:
    """What a client sees of a call."""

    messages: list[Any]
    code: grpc.StatusCode
    said: str
    trailing: dict[str, Any]
    details: dict[str, Any]


@contextlib.asynccontextmanager
async def served(backend: GrpcMethods) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    services.add_MediaGenerationServiceServicer_to_server(backend, server)
    health_pb2_grpc.add_HealthServicer_to_server(backend, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


def ask(backend: GrpcMethods, method: str, request: Any, **options: Any) -> Answer:
    async def story() -> Answer:
        async with served(backend) as channel:
            stub = services.MediaGenerationServiceStub(channel)
            if not hasattr(stub, method):
                stub = health_pb2_grpc.HealthStub(channel)
            return await finished(getattr(stub, method)(request, **options))

    return asyncio.run(story())


async def finished(call: Any) -> Answer:
    messages: list[Any] = []
    with contextlib.suppress(grpc.aio.AioRpcError):
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            messages.append(await call)
        else:
            async for message in call:
                messages.append(message)
    code, said, trailing = await call.code(), await call.details(), dict(await call.trailing_metadata())
    found: dict[str, Any] = {}
    if in_full := trailing.pop("grpc-status-details-bin", b""):
        rich = Status.FromString(in_full)
        assert (rich.code, rich.message) == (code.value[0], said)
        for detail in rich.details:
            kind = next(kind for kind in DETAILS if detail.Is(kind.DESCRIPTOR))
            detail.Unpack(unpacked := kind())
            found[kind.__name__] = unpacked
    return Answer(messages, code, said, trailing, found)


def params(**fields: Any) -> pb.GenerationParams:
    return json_format.ParseDict({"model": "one", "prompt": "a"} | fields, pb.GenerationParams())


def image(backend: GrpcMethods, metadata: Any = (), **fields: Any) -> Answer:
    return ask(backend, "GenerateImage", pb.GenerateImageRequest(params=params(**fields)), metadata=metadata)


def stream(backend: GrpcMethods, options: Any = None, **fields: Any) -> Answer:
    return ask(backend, "GenerateStream", pb.GenerateStreamRequest(params=params(**fields), options=options))


def generation(message: Any, models: Any) -> GenerationRequest:
    return asyncio.run(to_generation(message, models, "x"))


def test_every_rpc_has_a_method_of_the_gateway() -> None:
    """Serve calls it by the bare name, so that names of two services must differ."""
    found = [method for service in (pb.DESCRIPTOR, health_pb2.DESCRIPTOR) for method in methods(service)]
    names = [name for name, _ in found]
    assert len(set(names)) == len(names) == 13
    for name, streams in found:
        method = getattr(Gateway, name)
        assert hasattr(method, "__wrapped__"), name  # its errors are statuses
        code = method.__code__
        assert code.co_varnames[: code.co_argcount][-1] == "grpc_context"  # Serve passes it by this name
        assert bool(code.co_flags & 0x200) == streams, name


def methods(file: Any) -> list[tuple[str, bool]]:
    return [(m.name, m.server_streaming) for s in file.services_by_name.values() for m in s.methods]


def test_the_same_body_is_the_same_request_as_over_rest() -> None:
    models = Backend().models()
    fields = {"negative_prompt": "b", "num_inference_steps": 3, "true_cfg_scale": 0.0, "seeds": [0, 9], "n": 2}
    fields |= {"output_format": "webp", "flow_shift": 3.0}
    body = ImageGenerationBody(
        model="paint", prompt="a", size="64x48", output_compression=0, loras=[{"name": "ink"}], **fields
    )
    message = pb.GenerateImageRequest(
        params=params(
            **fields | {"model": "brush", "width": 64, "height": 48, "output_quality": 0, "loras": [{"name": "ink"}]}
        )
    )
    assert generation(message, models) == to_request(body, find_model(models, "paint"), "x")
    numbers = {"num_frames": 5, "fps": 8, "seed": 1, "guidance_scale_2": 2.0}
    film = VideoGenerationBody(model="film", prompt="a", **numbers)
    streamed = pb.GenerateStreamRequest(params=params(model="film", output_format="mp4", **numbers))
    assert generation(streamed, models) == to_request(film, find_model(models, "film"), "x")


def test_zero_is_not_absent() -> None:
    models = Backend().models()
    one = models["one"]
    absent = generation(pb.GenerateImageRequest(params=params()), models)
    zero = generation(pb.GenerateImageRequest(params=params(guidance_scale=0, seed=0)), models)
    assert (absent.guidance_scale, absent.seed_drawn) == (one.defaults.guidance_scale, True)
    assert (zero.guidance_scale, zero.seed, zero.seed_drawn) == (0, 0, False)
    with pytest.raises(InvalidParameter, match="num_inference_steps"):
        generation(pb.GenerateImageRequest(params=params(num_inference_steps=0)), models)


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
    *[
        ({name: value}, name, "unknown_parameter")
        for name, value in {
            "boundary_ratio": 0, "strength": 0,
            "num_frames": 5, "fps": 8, "extra": {"a": 1}, "embed_metadata": False,
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


@pytest.mark.parametrize("call", [image, stream])
def test_pictures_are_inputs_by_their_roles(call: Callable[..., Answer]) -> None:
    backend = Backend()
    picture, mask = encoded(colored()), encoded(colored(mode="L"))
    inputs = [
        {"role": "mask", "uri": f"data:image/png;base64,{base64.b64encode(mask).decode()}"},
        {"role": "image", "data": base64.b64encode(picture).decode()},
    ]
    answer = call(backend, inputs=inputs, strength=0.5, width=64, height=96)
    assert answer.code is OK, answer
    (request,) = backend.requests
    assert [each.role for each in request.inputs] == ["image", "mask"]
    assert (request.strength, request.width, request.height) == (0.5, 64, 96)
    call(backend, inputs=inputs[1:], task="TASK_IMAGE_TO_IMAGE")
    assert ([each.role for each in backend.requests[1].inputs], backend.requests[1].strength) == (["image"], None)
    backend.max_body_bytes = 1 << 21
    noise = encoded(Image.frombytes("RGB", (700, 700), random.Random(1).randbytes(3 * 700 * 700)))
    assert call(backend, inputs=[{"role": "image", "data": base64.b64encode(noise).decode()}]).code is OK
    assert len(noise) > MAX_TEXT_BYTES
    assert f"{MAX_TEXT_BYTES} bytes" in call(backend, prompt="a" * MAX_TEXT_BYTES).said


def test_videos_begin_with_pictures() -> None:
    backend = Backend()
    picture = {"role": "image", "data": base64.b64encode(encoded(colored(64, 48))).decode()}
    last = picture | {"role": "last_image"}
    assert stream(backend, task="TASK_IMAGE_TO_VIDEO", inputs=[picture]).code is OK
    assert stream(backend, task="TASK_FIRST_LAST_FRAME_TO_VIDEO", inputs=[picture, last], num_frames=5).code is OK
    assert [[each.role for each in request.inputs] for request in backend.requests] == [
        ["image"], ["image", "last_image"]
    ]  # fmt: skip
    assert {(each.width, each.height, each.output_format) for each in backend.requests} == {(64, 48, "mp4")}
    wrong = stream(backend, task="TASK_FIRST_LAST_FRAME_TO_VIDEO", inputs=[picture])
    assert "do not make a task first-last-frame-to-video: their roles are image" in wrong.said
    several = image(backend, task="TASK_EDIT", inputs=[picture, picture, picture | {"role": "control_image"}])
    assert "their roles are image, image, control_image" in several.said
    assert image(backend, task="TASK_EDIT", inputs=[picture, picture]).code is OK
    assert image(backend, task="TASK_CONTROL", inputs=[picture | {"role": "control_image"}]).code is OK


@pytest.mark.parametrize("fields", [{"model": "film"}, {"task": "TASK_TEXT_TO_VIDEO"}])
def test_only_a_stream_makes_videos(fields: dict[str, Any]) -> None:
    answer = image(Backend(), **fields)
    assert (answer.code, answer.said) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "GenerateImage makes no videos; call GenerateStream",
    )
    (header,) = [e.output_header for e in stream(Backend(), **fields).messages if e.HasField("output_header")]
    assert header.mime_type == "video/mp4"


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


def test_a_deadline_of_the_message() -> None:
    backend = Backend()
    for seconds in (0, -1, float("nan"), 1e9):
        scheduling = pb.Scheduling(deadline_seconds=seconds)
        answer = ask(backend, "GenerateImage", pb.GenerateImageRequest(params=params(), scheduling=scheduling))
        assert (answer.code, answer.said[:27]) == (grpc.StatusCode.INVALID_ARGUMENT, "scheduling.deadline_seconds")
    before = time.time()
    for name, kind in (("GenerateImage", pb.GenerateImageRequest), ("GenerateStream", pb.GenerateStreamRequest)):
        answer = ask(backend, name, kind(params=params(), scheduling=pb.Scheduling(deadline_seconds=60)))
        assert answer.code == OK
        at = backend.requests[-1].deadline_at
        assert at is not None and before + 60 <= at <= time.time() + 60


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


def test_a_stream_has_all_files_in_chunks() -> None:
    class Large(Backend):
        async def generate(self, request: GenerationRequest) -> AsyncIterator[Report]:
            yield Waiting(ModelState("starting", "loading", queued=3), 2, 7.5)
            yield StepEvent(1, 4, 0.5)
            yield Restarted(2, "the ranks were lost")
            yield StepEvent(1, 4, 1.0)
            yield StepEvent(4, 4, 3.0)
            yield GenerationResult(FILES, (7, 8), ParallelDegrees(), 0.1, (0.5,), 0.2, ("prompt: cut",))

    FILES = (bytes(range(256)) * 40, b"b" * 4096)
    events = stream(Large(), pb.StreamOptions(chunk_bytes=4096), seed=7, n=2).messages
    assert [event.WhichOneof("event") for event in events] == [
        *["accepted", "queued", "progress", "restarted", "progress", "progress"],
        *["output_header", "output_chunk", "output_chunk", "output_chunk", "output_header", "output_chunk", "done"],
    ]
    queued = events[1].queued
    assert (queued.state, queued.reason, queued.waiting) == ("starting", "loading", 3)
    assert (queued.position, queued.eta_seconds) == (2, 7.5)
    assert events[3].restarted.attempt == 2
    progress = [event.progress for event in events if event.HasField("progress")]
    assert [(each.step, each.eta_seconds, each.stage) for each in progress] == [
        (1, 1.5, "denoise"), (1, 3.0, "denoise"), (4, 0.0, "decode"),
    ]  # fmt: skip
    for index, file in enumerate(FILES):
        chunks = [e.output_chunk for e in events if e.HasField("output_chunk") and e.output_chunk.index == index]
        assert b"".join(chunk.data for chunk in chunks) == file
        assert [chunk.offset for chunk in chunks] == list(range(0, len(file), 4096))
        head = next(e.output_header for e in events if e.HasField("output_header") and e.output_header.index == index)
        assert (head.sha256, head.total_bytes) == (hashlib.sha256(file).hexdigest(), len(file))
        assert head.seed == 7 + index
    assert events[-1].done.warnings[0].code == "prompt_truncated"


class Took(Backend):
    """Its result says what it took: 0.1 s to encode, steps of 0.5 and 0.25 s, 0.2 s to decode, 0.05 s for the file."""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Report]:
        await asyncio.sleep(0.2)
        yield GenerationResult((b"a",), (7,), ParallelDegrees(2), 0.1, (0.5, 0.25), 0.2, (), 0.05)


@pytest.mark.parametrize("call", [image, stream])
def test_the_numbers_of_an_answer(call: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("service.rpc.methods.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("service.rpc.answers.time", SimpleNamespace(monotonic=lambda: next(clock)))
    messages = call(Took(), width=64, height=96).messages
    last = messages[-1] if call is image else messages[-1].done
    head = messages[0].outputs[0].header if call is image else messages[1].output_header
    assert (head.width, head.height, head.num_frames, head.fps, head.total_bytes) == (64, 96, 1, 0, 1)
    assert head.mime_type == "image/png"
    seconds = last.metrics
    assert seconds.queue_seconds == pytest.approx(4 - 1.1)  # what the gang did not compute
    assert seconds.generate_seconds == pytest.approx(1.1)
    assert {name: round(value, 3) for name, value in seconds.stage_seconds.items()} == {
        "encode": 0.1, "denoise": 0.75, "decode": 0.2,
    }  # fmt: skip
    assert (list(seconds.step_seconds), seconds.layout) == ([0.5, 0.25], "ulysses_degree=2")


def test_the_queue_was_never_shorter_than_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank's clock is another one."""
    assert image(Took()).messages[0].metrics.queue_seconds == 0


def test_the_numbers_of_a_video() -> None:
    answer = stream(Backend(), model="film", width=64, height=96, num_frames=9, fps=8)
    (head,) = [event.output_header for event in answer.messages if event.HasField("output_header")]
    assert (head.width, head.height, head.num_frames, head.fps, head.mime_type) == (64, 96, 9, 8.0, "video/mp4")


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 6), ("cpu", 0)])
def test_the_gpus_of_a_gang(device: Any, gpus: int) -> None:
    model = a_model("one").model_copy(update={"device": device, "parallel": ParallelDegrees(3, 2)})
    assert model_message(model, None).gpus_per_replica == gpus


def test_an_id_of_the_client_begins_that_of_the_request() -> None:
    backend = Backend()
    for request_id, metadata in (("mine", ()), ("", (("x-request-id", "mine"),)), ("mine", (("x-request-id", "b"),))):
        request = pb.GenerateImageRequest(params=params(), request_id=request_id)
        answer = ask(backend, "GenerateImage", request, metadata=metadata)
        assert answer.trailing["x-request-id"] == backend.requests[-1].request_id
        assert backend.requests[-1].request_id.startswith("mine-")
    answer = ask(backend, "GenerateImage", pb.GenerateImageRequest(params=params(), request_id="a b"))
    assert (answer.code, answer.said[:10]) == (grpc.StatusCode.INVALID_ARGUMENT, "request_id")


@pytest.mark.parametrize("method", sorted({name for name, _ in methods(pb.DESCRIPTOR)}))
def test_every_method_asks_for_a_key(method: str) -> None:
    backend = Backend()
    backend.key = "k"
    request = getattr(pb, f"{method}Request")()
    for metadata in ((), (("authorization", "Bearer x"),), (("x-api-key", "x"),)):
        answer = ask(backend, method, request, metadata=metadata)
        assert answer.code == grpc.StatusCode.UNAUTHENTICATED
        assert answer.details["ErrorInfo"].reason == "invalid_api_key"
    for metadata in ((("authorization", "Bearer k"),), (("x-api-key", "k"),)):
        assert ask(backend, method, request, metadata=metadata).code != grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("peer", "local"),
    [("ipv4:127.0.0.1:5", True), ("ipv6:[::1]:5", True), ("ipv6:%5B::1%5D:5", True), ("unix:", True),
     ("ipv4:10.0.0.7:5", False), ("ipv6:%5B2001:db8::1%5D:5", False), ("", False)],
)  # fmt: skip
def test_a_server_for_its_own_machine_refuses_others(peer: str, local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses._is_local(peer) == local
    monkeypatch.setattr(statuses, "_is_local", lambda _: local)
    backend = Backend()
    backend.local_only = True
    assert image(backend).code == (OK if local else grpc.StatusCode.PERMISSION_DENIED)


@pytest.mark.parametrize("call", ["GenerateImage", "GenerateStream"])
@pytest.mark.parametrize("leaves", ["cancels", "deadline"])
def test_a_caller_who_leaves_ends_its_request(call: str, leaves: str) -> None:
    backend = Backend()

    async def story() -> None:
        async with served(backend) as channel:
            method = getattr(services.MediaGenerationServiceStub(channel), call)
            request = getattr(pb, f"{call}Request")(params=params(prompt="endless"))
            asked = method(request, timeout=1.0 if leaves == "deadline" else None)
            while not backend.requests:
                await asyncio.sleep(0.01)
            if leaves == "cancels":
                asked.cancel()
            while not backend.closed:
                await asyncio.sleep(0.01)
            if leaves == "deadline":
                assert await asked.code() == grpc.StatusCode.DEADLINE_EXCEEDED

    asyncio.run(asyncio.wait_for(story(), 60))


@pytest.mark.parametrize("heard", [0, 1, 2])
def test_a_stream_that_is_closed_between_two_reports_ends_its_request(heard: int) -> None:
    """So it is when the client reads slowly and leaves: no report is waited for then."""
    backend = Backend()
    request = generation(pb.GenerateImageRequest(params=params(prompt="endless")), backend.models())

    async def story() -> None:
        reports = _taken_on(backend.generate(request))
        for _ in range(1 + heard):
            await anext(reports)
        await reports.aclose()
        assert backend.closed

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_request_that_waits_is_accepted_before_it_runs() -> None:
    backend = Backend()

    async def story() -> None:
        async with served(backend) as channel:
            request = pb.GenerateStreamRequest(params=params(prompt="slow"))
            call = services.MediaGenerationServiceStub(channel).GenerateStream(request)
            assert (await call.read()).HasField("accepted")
            backend.released.set()
            assert (await call.read()).HasField("progress")

    asyncio.run(asyncio.wait_for(story(), 60))


def test_models_are_told() -> None:
    backend = Backend()
    backend.found["film"] = ModelState("waiting", "no GPU is free")
    models = {model.id: model for model in ask(backend, "ListModels", pb.ListModelsRequest()).messages[0].models}
    assert list(models) == ["one", "two", "paint", "film"]
    film = models["film"]
    assert (film.state, film.reason, film.replicas_ready) == ("waiting", "no GPU is free", 0)
    assert (list(film.tasks), list(film.aliases), list(film.loras)) == ([pb.TASK_TEXT_TO_VIDEO], ["movie"], ["ink"])
    assert (film.defaults.width, film.defaults.num_frames, film.limits.max_num_frames) == (64, 5, 9)
    assert not models["one"].limits.HasField("max_work")


def test_health() -> None:
    backend = Backend()
    backend.found |= {"two": ModelState("failed", "x"), "paint": ModelState("asleep")}

    def status(service: str) -> int:
        return int(ask(backend, "Check", health_pb2.HealthCheckRequest(service=service)).messages[0].status)

    assert [status(name) for name in ("", health.SERVER[1], "one", "two", "paint")] == [1, 1, 1, 2, 1]
    answer = ask(backend, "Check", health_pb2.HealthCheckRequest(service="nope"))
    assert answer.code == grpc.StatusCode.NOT_FOUND
    statuses_ = ask(backend, "List", health_pb2.HealthListRequest()).messages[0].statuses
    assert {name: each.status for name, each in statuses_.items()} == {
        "": 1, "one": 1, "two": 2, "paint": 1, "film": 1,
    }  # fmt: skip
    backend.draining = True
    assert [status(name) for name in ("", "one")] == [2, 2]


def test_health_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_S", 0.01)
    monkeypatch.setattr("service.rpc.methods.MOST_WATCHERS", 2)
    backend = Backend()

    async def story() -> None:
        async with served(backend) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            one = stub.Watch(health_pb2.HealthCheckRequest(service="one"))
            none = stub.Watch(health_pb2.HealthCheckRequest(service="nope"))
            assert [(await each.read()).status for each in (one, none)] == [1, 3]
            backend.found["one"] = ModelState("failed")
            assert (await one.read()).status == 2
            refused = await finished(stub.Watch(health_pb2.HealthCheckRequest()))
            assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
            one.cancel()
            while backend._watchers == 2:
                await asyncio.sleep(0.01)
            assert (await stub.Watch(health_pb2.HealthCheckRequest()).read()).status == 1

    asyncio.run(asyncio.wait_for(story(), 60))


@pytest.mark.parametrize(("service", "told"), [("", [1, 2]), ("one", [1, 2]), ("two", [2]), ("nope", [3])])
def test_watching_ends_when_the_gateway_drains(monkeypatch: pytest.MonkeyPatch, service: str, told: list[int]) -> None:
    monkeypatch.setattr(health, "LOOK_S", 0.01)
    backend = Backend()
    backend.found["two"] = ModelState("failed")

    async def story() -> None:
        async with served(backend) as channel:
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))
            heard = []
            async for message in watching:
                heard.append(message.status)
                backend.draining = True
            assert (await watching.code(), heard) == (OK, told)
            assert backend._watchers == 0

    asyncio.run(asyncio.wait_for(story(), 60))


def test_watching_has_a_longest_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_S", 0.01)
    monkeypatch.setattr(health, "LONGEST_S", 0.2)
    backend = Backend()
    answer = ask(backend, "Watch", health_pb2.HealthCheckRequest())
    assert (answer.code, [message.status for message in answer.messages]) == (OK, [1])
    assert backend._watchers == 0


def test_a_large_message_is_refused() -> None:
    backend = Backend()
    backend.max_body_bytes = 1024
    answer = image(backend, prompt="a" * 1024)
    assert (answer.code, answer.details["ErrorInfo"].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "body_too_large")
