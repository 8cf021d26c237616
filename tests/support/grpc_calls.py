"""Calls of the gRPC API over grpc's own server, in front of the backend of the tests: what a client sees of each."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import json_format
from google.rpc import error_details_pb2 as kinds
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2_grpc

from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services
from service.rpc.methods import GrpcMethods
from tests.support.backend import FakeBackend

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


def methods(file: Any) -> list[tuple[str, bool]]:
    return [(m.name, m.server_streaming) for s in file.services_by_name.values() for m in s.methods]
