"""gRPC alone, without Ray, over grpc's own server: what is accepted, what is refused and how, health, who may call."""

import asyncio
import base64
import hashlib
import random
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from PIL import Image

from service.api.backend import Report, Restarted, Waiting
from service.api.reading import MAX_TEXT_BYTES
from service.api.schemas import ImageGenerationBody, VideoGenerationBody, find_model, to_request
from service.gateway import Gateway
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services
from service.rpc import statuses
from service.rpc.answers import model_message
from service.rpc.methods import _taken_on
from service.rpc.requests import to_generation
from service.state.model_states import ModelState
from sp_core.degrees import ParallelDegrees
from tests.support.backend import a_model
from tests.support.grpc_calls import OK, Answer, Backend, ask, image, methods, params, served, stream
from tests.support.hostile import colored
from tests.support.hostile import file as encoded
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest, GenerationResult, StepEvent


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
