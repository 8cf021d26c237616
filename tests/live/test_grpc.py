"""The gRPC API on a local cluster, through Serve's proxy: the bytes of REST, and what the proxy makes of errors."""

import base64
import functools
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import QwenImageInpaintPipeline
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2 as details
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from PIL import Image

from deploy.model_sections import Defaults
from deploy.spec import Auth
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import (
    deployment,
    in_each_forward,
    model,
    on_rank,
    rank_statuses,
    ready,
    wait_for,
    wait_while,
)
from tests.support.hostile import colored
from tests.support.hostile import file as encoded
from tests.support.listeners import Address, listeners, process_tree
from workers.demo_models.writer import write_demo_model

KEY = "k1"
WITH_KEY = (("authorization", f"Bearer {KEY}"),)
CUP = {"model": "demo", "prompt": "a cup of coffee", "seed": 7, "num_inference_steps": 3}
SIZE = {"width": 64, "height": 48}
SQUARE = {"width": 64, "height": 64}
SERVICE = "mediagen.v1.MediaGenerationService"


@pytest.fixture(scope="module")
def listened_before() -> set[tuple[Address, int]]:
    return listeners(process_tree(os.getpid()))


@pytest.fixture(scope="module")
def cluster(
    demo_model: Path, tmp_path_factory: pytest.TempPathFactory, listened_before: set[tuple[Address, int]]
) -> Iterator[LocalCluster]:
    """A model of pictures on two ranks and one of videos, for callers with a key."""
    write_demo_model(folder := tmp_path_factory.mktemp("models") / "film", "wan")
    film = model(folder, "film").model_copy(
        update={"defaults": Defaults(width=64, height=64, num_inference_steps=2, num_frames=5)}
    )
    spec = deployment(model(demo_model, "demo", ulysses_degree=2), film)
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    entries = [{"name": key, "sha256": hashlib.sha256(key.encode()).hexdigest()} for key in (KEY, "another")]
    keys.write_text(json.dumps({"keys": entries}))
    spec = spec.model_copy(update={"auth": Auth(api_keys_file=str(keys))})
    with LocalCluster(spec) as cluster:
        ready(cluster)
        yield cluster


@pytest.fixture(scope="module")
def channel(cluster: LocalCluster) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(cluster.grpc_target) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> services.MediaGenerationServiceStub:
    return services.MediaGenerationServiceStub(channel)


def rest(cluster: LocalCluster, path: str = "images/generations", **body: Any) -> httpx.Response:
    url, headers = f"{cluster.url}/v1/{path}", {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(url, json=CUP | body, headers=headers, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer


def streamed(stub: services.MediaGenerationServiceStub, **params: Any) -> Any:
    request = pb.GenerateStreamRequest(params=pb.GenerationParams(**CUP | params), request_id="cup")
    return stub.GenerateStream(request, metadata=WITH_KEY, timeout=300)


def files(events: list[pb.GenerateStreamResponse]) -> list[bytes]:
    """The files of a stream, put together."""
    found = {event.output_header.index: bytearray() for event in events if event.HasField("output_header")}
    for event in events:
        if event.HasField("output_chunk"):
            assert event.output_chunk.offset == len(found[event.output_chunk.index])
            found[event.output_chunk.index] += event.output_chunk.data
    return [bytes(file) for file in found.values()]


def refusal(call: Any) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """The status of a call that fails, and its details by their kind."""
    with pytest.raises(grpc.RpcError) as failed:
        list(call) if hasattr(call, "__next__") else call()
    error: Any = failed.value
    rich = rpc_status.from_call(error)
    assert rich is not None, f"{error.code()} without details: {error.details()}"
    found = {}
    for detail in rich.details:
        for kind in (details.ErrorInfo, details.BadRequest, details.RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(message := kind())
                found[kind.__name__] = message
    return error.code(), found


def test_one_seed_is_the_same_bytes_over_rest_sse_file_url_and_grpc(
    cluster: LocalCluster, stub: services.MediaGenerationServiceStub
) -> None:
    body = {"size": "64x48", "n": 2}
    reference = [base64.b64decode(each["b64_json"]) for each in rest(cluster, **body).json()["data"]]
    assert len(set(reference)) == 2
    lines = rest(cluster, **body, stream=True).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert [base64.b64decode(event["b64_json"]) for event in events] == reference
    with zipfile.ZipFile(io.BytesIO(rest(cluster, **body, response_format="file").content)) as archive:
        assert [archive.read(name) for name in archive.namelist()] == reference
    by_url = rest(cluster, **body, response_format="url").json()["data"]
    assert [httpx.get(each["url"], trust_env=False).content for each in by_url] == reference
    params = pb.GenerationParams(**CUP, **SIZE, n=2)
    unary = stub.GenerateImage(pb.GenerateImageRequest(params=params), metadata=WITH_KEY)
    assert [output.data for output in unary.outputs] == reference
    assert [output.header.seed for output in unary.outputs] == [7, 8]
    told = list(streamed(stub, **SIZE, n=2))
    assert files(told) == reference
    hashes = [event.output_header.sha256 for event in told if event.HasField("output_header")]
    assert hashes == [hashlib.sha256(file).hexdigest() for file in reference]
    assert files(list(streamed(stub, **SIZE, n=2, seed=8)))[0] != reference[0]


def test_a_picture_that_begins_with_one_is_that_of_the_classic_pipeline(
    cluster: LocalCluster, stub: services.MediaGenerationServiceStub, demo_model: Path
) -> None:
    """A part of a picture drawn anew by two ranks, asked for by OpenAI's client and over gRPC."""
    picture, mask = colored(64, 48), Image.new("L", (64, 48))
    mask.paste(255, (16, 8, 48, 40))
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=KEY, max_retries=0)
    extra: Any = {"extra_body": {"seed": 7, "num_inference_steps": 3, "strength": 0.7}}
    made = client.images.edit(
        model="demo", prompt=CUP["prompt"], image=encoded(picture), mask=encoded(mask), size="64x48", **extra
    )
    drawn = base64.b64decode((made.data or [])[0].b64_json or "")
    inputs = [
        pb.MediaInput(role="image", data=encoded(picture, "WEBP", lossless=True)),
        pb.MediaInput(role="mask", data=encoded(mask)),
    ]
    assert files(list(streamed(stub, **SIZE, inputs=inputs, strength=0.7))) == [drawn]
    classic = QwenImageInpaintPipeline.from_pretrained(demo_model)
    (expected,) = classic(
        CUP["prompt"], image=picture, mask_image=mask, width=64, height=48, num_inference_steps=3, strength=0.7,
        generator=torch.Generator().manual_seed(7),
    ).images  # fmt: skip
    found = np.asarray(Image.open(io.BytesIO(drawn)), dtype=np.int16)
    assert np.abs(found - np.asarray(expected, dtype=np.int16)).max() <= 1


def test_a_stream_tells_what_happens_in_order(stub: services.MediaGenerationServiceStub) -> None:
    call = streamed(stub)
    events = list(call)
    kinds = [event.WhichOneof("event") for event in events if not event.HasField("queued")]
    assert kinds == ["accepted", *["progress"] * 3, "output_header", "output_chunk", "done"]
    steps = [(event.progress.step, event.progress.total_steps) for event in events if event.HasField("progress")]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert events[0].accepted.job_id.startswith("cup-")
    assert dict(call.trailing_metadata())["x-request-id"] == events[0].accepted.job_id
    assert events[-1].done.metrics.layout == "ulysses_degree=2"
    assert set(events[-1].done.metrics.stage_seconds) == {"encode", "denoise", "decode"}


def test_previews_come_when_the_options_ask(stub: services.MediaGenerationServiceStub) -> None:
    """A picture's and a video's; the file stays the same."""
    for fields in ({**CUP, "num_inference_steps": 7}, {**CUP, "model": "film", "num_inference_steps": 4}):
        params = pb.GenerationParams(**fields)
        plain = list(stub.GenerateStream(pb.GenerateStreamRequest(params=params), metadata=WITH_KEY))
        options = pb.StreamOptions(preview_every_n_steps=3, preview_max_edge=32)
        request = pb.GenerateStreamRequest(params=params, options=options)
        events = list(stub.GenerateStream(request, metadata=WITH_KEY))
        assert files(events) == files(plain)
        previews = [event.preview for event in events if event.HasField("preview")]
        assert [preview.step for preview in previews] == list(range(3, fields["num_inference_steps"], 3))
        assert all(Image.open(io.BytesIO(preview.data)).width == 32 for preview in previews)
        assert not any(event.HasField("preview") for event in plain)


def test_a_video_is_the_same_bytes_over_rest_and_grpc(
    cluster: LocalCluster, stub: services.MediaGenerationServiceStub
) -> None:
    film = {"model": "film", "num_inference_steps": 2}
    reference = rest(cluster, "videos/sync", **film, num_frames=5, fps=8, size="64x64").content
    events = list(streamed(stub, **film, num_frames=5, fps=8, width=64, height=64))
    assert files(events) == [reference]
    for form in ({"response_format": "b64_json"}, {"stream": True}):
        answer = rest(cluster, "videos/sync", **film, num_frames=5, fps=8, size="64x64", **form).text
        (told,) = re.findall(r'"b64_json": ?"([^"]*)"', answer)
        assert base64.b64decode(told) == reference
    (header,) = [event.output_header for event in events if event.HasField("output_header")]
    assert (header.mime_type, header.num_frames, header.fps) == ("video/mp4", 5, 8)
    assert sum(event.HasField("progress") for event in events) == 2


def test_a_job_draws_the_same_bytes_over_both_apis_for_its_own_key_alone(
    cluster: LocalCluster, stub: services.MediaGenerationServiceStub
) -> None:
    film = {"model": "film", "num_inference_steps": 2, "num_frames": 5, "fps": 8, "size": "64x64"}
    job = rest(cluster, "videos", **film).json()
    url, own = f"{cluster.url}/v1/videos/{job['id']}", {"authorization": f"Bearer {KEY}"}
    done = wait_for(
        lambda: httpx.get(url, headers=own, trust_env=False).json(),
        lambda video: video["status"] not in ("queued", "in_progress"),
    )
    assert (done["status"], done["error"], done["attempt"], done["step"]) == ("completed", None, 1, 2)
    content = httpx.get(f"{url}/content", headers=own, trust_env=False).content
    assert content == rest(cluster, "videos/sync", **film).content
    assert (made := drawn(stub, CUP | film | SQUARE)) == [content]
    assert made != drawn(stub, CUP | film | SQUARE | {"seed": 8})
    pictures = [base64.b64decode(each["b64_json"]) for each in rest(cluster, size="64x48", n=2).json()["data"]]
    assert drawn(stub, CUP | SIZE | {"n": 2}) == pictures
    another = {"authorization": "Bearer another"}
    assert httpx.get(url, headers=another, trust_env=False).status_code == 404
    code, found = refusal(lambda: stub.GetJob(pb.GetJobRequest(id=job["id"]), metadata=(("x-api-key", "another"),)))
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.NOT_FOUND, "job_not_found")


def drawn(stub: services.MediaGenerationServiceStub, fields: dict[str, Any]) -> list[bytes]:
    """The files of a job over gRPC, each fetched whole, and again from its hundredth byte on."""
    params = pb.GenerationParams(**{name: value for name, value in fields.items() if name != "size"})
    job = stub.CreateJob(pb.CreateJobRequest(params=params), metadata=WITH_KEY).job
    states = [message.job.state for message in stub.WatchJob(pb.WatchJobRequest(id=job.id), metadata=WITH_KEY)]
    assert states[-1] == pb.JOB_STATE_SUCCEEDED
    done = stub.GetJob(pb.GetJobRequest(id=job.id), metadata=WITH_KEY).job
    files = []
    for output in done.outputs:
        whole, rest_of_it = (
            b"".join(
                part.chunk.data
                for part in stub.DownloadOutput(
                    pb.DownloadOutputRequest(job_id=job.id, index=output.index, offset=offset), metadata=WITH_KEY
                )
            )
            for offset in (0, 100)
        )
        assert whole[100:] == rest_of_it
        assert (len(whole), hashlib.sha256(whole).hexdigest()) == (output.total_bytes, output.sha256)
        files.append(whole)
    return files


def test_errors_have_their_status_and_details(stub: services.MediaGenerationServiceStub) -> None:
    """Both kinds of call, as Serve's proxy treats them differently."""
    unary = pb.GenerateImageRequest(params=pb.GenerationParams(**CUP, strength=0.5))
    for call in (lambda: stub.GenerateImage(unary, metadata=WITH_KEY), streamed(stub, strength=0.5)):
        code, found = refusal(call)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == ("unknown_parameter", "spray")
        assert [violation.field for violation in found["BadRequest"].field_violations] == ["params.strength"]
    code, found = refusal(streamed(stub, model="nope"))
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.NOT_FOUND, "model_not_found")
    code, found = refusal(streamed(stub, width=72, height=64))  # only the ranks know that it is wrong
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_size")
    assert found["BadRequest"].field_violations[0].field == "params.width"
    code, found = refusal(lambda: stub.GetJob(pb.GetJobRequest(id="a"), metadata=WITH_KEY))
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.NOT_FOUND, "job_not_found")
    code, found = refusal(stub.WatchJob(pb.WatchJobRequest(id="a"), metadata=WITH_KEY))
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.NOT_FOUND, "job_not_found")


def test_a_key_is_asked_for(stub: services.MediaGenerationServiceStub) -> None:
    image = pb.GenerateImageRequest(params=pb.GenerationParams(**CUP))
    stream = pb.GenerateStreamRequest(params=pb.GenerationParams(**CUP))
    for metadata in ((), (("authorization", "Bearer no"),), (("x-api-key", "no"),)):
        for call in (
            functools.partial(stub.GenerateImage, image, metadata=metadata),
            functools.partial(stub.ListModels, pb.ListModelsRequest(), metadata=metadata),
            stub.GenerateStream(stream, metadata=metadata),
        ):
            code, found = refusal(call)
            assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
    models = stub.ListModels(pb.ListModelsRequest(), metadata=(("x-api-key", KEY),)).models
    assert {each.id: each.state for each in models} == {"demo": "running", "film": "running"}


def test_health_of_the_server_and_of_each_model(channel: grpc.Channel) -> None:
    """Probes have no key."""
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE, "demo", "film"):
        assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == 1
        watching = health.Watch(health_pb2.HealthCheckRequest(service=service))
        assert next(watching).status == 1
        watching.cancel()
    code, found = refusal(lambda: health.Check(health_pb2.HealthCheckRequest(service="nope")))
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.NOT_FOUND, "model_not_found")
    assert set(health.List(health_pb2.HealthListRequest()).statuses) == {"", "demo", "film"}


def test_a_client_that_knows_only_reflection_draws_a_picture(channel: grpc.Channel, cluster: LocalCluster) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    reflection = "grpc.reflection.v1alpha.ServerReflection"
    assert set(database.get_services()) == {SERVICE, "grpc.health.v1.Health", reflection}
    method = DescriptorPool(database).FindServiceByName(SERVICE).methods_by_name["GenerateImage"]
    request = message_factory.GetMessageClass(method.input_type)()
    json_format.ParseDict({"params": CUP | SIZE}, request)
    call = channel.unary_unary(
        f"/{SERVICE}/GenerateImage",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    answer = call(request, metadata=WITH_KEY)
    assert [each.data for each in answer.outputs] == [
        base64.b64decode(rest(cluster, size="64x48").json()["data"][0]["b64_json"])
    ]


def test_the_example_of_the_documents_draws_a_picture(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).resolve().parents[2] / "service" / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import grpc" in block]
    assert "127.0.0.1:9000" in example and "Bearer KEY" in example
    monkeypatch.chdir(tmp_path)
    exec(example.replace("127.0.0.1:9000", cluster.grpc_target).replace("Bearer KEY", f"Bearer {KEY}"), {})
    assert Image.open(tmp_path / "cup.png").size == (64, 64)
    assert capsys.readouterr().out.splitlines() == [f"step {step}/4" for step in (1, 2, 3, 4)]


def test_a_client_of_others_finds_its_way(cluster: LocalCluster) -> None:
    """buf's, which asks by reflection as grpcurl does."""
    url = f"http://{cluster.grpc_target}/{SERVICE}/GenerateStream"
    key, body = f"authorization: Bearer {KEY}", json.dumps({"params": CUP})
    command = [Path(sys.executable).parent / "buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    answer = subprocess.run([*command, "-H", key, "-d", body, url], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    kinds = [next(iter(event)) for event in json_lines(answer.stdout)]
    assert [kind for kind in kinds if kind != "queued"] == [
        "accepted", *["progress"] * 3, "outputHeader", "outputChunk", "done",
    ]  # fmt: skip


def json_lines(text: str) -> list[dict[str, Any]]:
    """The JSON objects that follow each other in a text."""
    decoder, found = json.JSONDecoder(), []
    while text := text.strip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


def busy_steps(hold: Path) -> None:
    """Slow steps, as long as the file exists."""
    if hold.exists():
        threading.Event().wait(0.2)


@pytest.mark.parametrize("leaves", ["cancels", "deadline"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_who_leaves_frees_the_gang(
    stub: services.MediaGenerationServiceStub, tmp_path: Path, leaves: str, stream: bool
) -> None:
    (hold := tmp_path / "hold").touch()
    on_rank("demo", 1, in_each_forward, functools.partial(busy_steps, hold))
    before = rank_statuses("demo")
    params = pb.GenerationParams(**CUP | {"num_inference_steps": 100})
    kind, method = (
        (pb.GenerateStreamRequest, stub.GenerateStream) if stream else (pb.GenerateImageRequest, stub.GenerateImage)
    )
    timeout = 5 if leaves == "deadline" else None
    how: Any = {"metadata": WITH_KEY, "timeout": timeout}
    call = method(kind(params=params), **how) if stream else method.future(kind(params=params), **how)
    wait_for(lambda: rank_statuses("demo")[0].progress, lambda progress: progress > before[0].progress + 3)
    if leaves == "cancels":
        call.cancel()
    else:
        with pytest.raises(grpc.RpcError) as late:
            list(call) if stream else call.result()
        assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    wait_for(lambda: {status.phase for status in rank_statuses("demo")}, lambda phases: phases == {"idle"})
    hold.unlink()
    stopped = rank_statuses("demo")
    assert stopped[0].progress - before[0].progress < 100, "the request ran to its end"
    assert [status.pid for status in stopped] == [status.pid for status in before]


def test_a_full_queue_is_said_so(stub: services.MediaGenerationServiceStub, tmp_path: Path) -> None:
    (held := tmp_path / "held").touch()
    on_rank("demo", 0, in_each_forward, functools.partial(wait_while, held))
    request = pb.GenerateImageRequest(params=pb.GenerationParams(**CUP))
    try:
        asked = [stub.GenerateImage.future(request, metadata=WITH_KEY) for _ in range(8)]
        wait_for(lambda: any(each.done() for each in asked), bool)
        refused = next(each for each in asked if each.done())
        code, found = refusal(refused.result)
    finally:
        held.unlink()
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue_full")
    assert 1 <= found["RetryInfo"].retry_delay.seconds <= 120
    codes = {each.code() for each in asked}
    assert codes == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_a_message_above_the_limit_is_refused(stub: services.MediaGenerationServiceStub) -> None:
    """By the gateway with a reason, and far above by the proxy, which does not read it."""
    request = pb.GenerateImageRequest(params=pb.GenerationParams(**CUP | {"prompt": "a" * (2 << 20)}))
    code, found = refusal(lambda: stub.GenerateImage(request, metadata=WITH_KEY))
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "body_too_large")
    request.params.prompt = "a" * (65 << 20)
    with pytest.raises(grpc.RpcError) as refused:
        stub.GenerateImage(request, metadata=WITH_KEY)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]


def test_grpc_listens_at_the_gateways_host_only(
    cluster: LocalCluster, channel: grpc.Channel, listened_before: set[tuple[Address, int]]
) -> None:
    found = listeners(process_tree(os.getpid())) - listened_before
    port = int(cluster.grpc_target.rpartition(":")[2])
    assert [str(address) for address, at in found if at == port] == ["127.0.0.1"]
    assert {str(address) for address, _ in found if not address.is_loopback} == set()


@pytest.mark.fault
def test_a_stream_that_loses_its_gang_starts_again(stub: services.MediaGenerationServiceStub) -> None:
    reference = files(list(streamed(stub)))
    call = streamed(stub, num_inference_steps=3)
    events = [next(call)]
    while not events[-1].HasField("progress"):
        events.append(next(call))
    os.kill(rank_statuses("demo")[1].pid, signal.SIGKILL)
    events += list(call)
    restarts = [event.restarted.attempt for event in events if event.HasField("restarted")]
    assert restarts == [2]
    assert files(events) == reference


@pytest.mark.fault
def test_a_gateway_that_dies_is_said_so(
    cluster: LocalCluster, stub: services.MediaGenerationServiceStub, tmp_path: Path
) -> None:
    (hold := tmp_path / "hold").touch()
    on_rank("demo", 0, in_each_forward, functools.partial(wait_while, hold))
    call = streamed(stub)
    try:
        assert next(call).HasField("accepted")
        tree = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in process_tree(os.getpid())}
        (gateway,) = [pid for pid, command in tree.items() if command.startswith("ray::ServeReplica:gateway:")]
        os.kill(gateway, signal.SIGKILL)
        code, found = refusal(call)
    finally:
        hold.unlink()
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "gateway_lost")
    assert found["RetryInfo"].retry_delay.seconds == 5
    request = pb.GenerateImageRequest(params=pb.GenerationParams(**CUP))
    assert wait_for(lambda: again(stub, request), bool)


def again(stub: services.MediaGenerationServiceStub, request: pb.GenerateImageRequest) -> Any:
    """The answer, or None while there is no gateway."""
    try:
        return stub.GenerateImage(request, metadata=WITH_KEY, timeout=60)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNAVAILABLE, error  # type: ignore[attr-defined]
        return None
