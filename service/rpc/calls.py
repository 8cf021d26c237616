"""How RPCs answer: their errors become statuses, and a request is let in. For `service.rpc.methods` and `.jobs`."""

import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from service.api.backend import Backend
from service.api.errors import find_status
from service.api.observed import observing
from service.api.origin import ID_HEADER
from service.api.reading import MAX_TEXT_BYTES
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.rpc.requests import id_of
from service.rpc.statuses import Context, admit, metadata, refuse, tell
from workers.errors import BodyTooLarge
from workers.tracing import HEADER

Answer = TypeVar("Answer", bound=Message)
Unary = Callable[[Any, Any, Context], Awaitable[Answer]]
Stream = Callable[[Any, Any, Context], AsyncGenerator[Answer]]


def answering(kind: type[Answer]) -> Callable[[Unary[Answer]], Unary[Answer]]:
    """Let a unary method's errors be its status, beside an empty answer of this kind."""

    def wrap(method: Unary[Answer]) -> Unary[Answer]:
        @functools.wraps(method)
        async def answered(self: Any, request: Any, grpc_context: Context) -> Answer:
            with observing(method.__name__, "CANCELLED", metadata(grpc_context).get(HEADER, "")) as call:
                try:
                    answer = await method(self, request, grpc_context)
                    call.code = "OK"
                except Exception as error:
                    call.code = find_status(error).grpc
                    refuse(grpc_context, error)
                    answer = kind()
                tell(grpc_context, call.answer)
                return answer

        return answered

    return wrap


def streaming(last: Callable[[pb.JobError], Answer]) -> Callable[[Stream[Answer]], Stream[Answer]]:
    """Let a stream's errors be its status. The last message brings the status: Serve forgets one that comes after it.

    Args:
        last: makes that message of the error.
    """

    def wrap(method: Stream[Answer]) -> Stream[Answer]:
        @functools.wraps(method)
        async def streamed(self: Any, request: Any, grpc_context: Context) -> AsyncGenerator[Answer]:
            with observing(method.__name__, "CANCELLED", metadata(grpc_context).get(HEADER, "")) as call:
                try:
                    async with contextlib.aclosing(method(self, request, grpc_context)) as messages:
                        async for message in messages:
                            tell(grpc_context, call.answer)
                            call.answer.clear()  # it is told once
                            yield message
                    call.code = "OK"
                except Exception as error:
                    call.code = find_status(error).grpc
                    tell(grpc_context, call.answer)
                    yield last(refuse(grpc_context, error))

        return streamed

    return wrap


def enter(
    backend: Backend,
    request: pb.GenerateImageRequest | pb.GenerateStreamRequest | pb.CreateJobRequest,
    context: Context,
) -> str:
    """Let a caller in, and return the id of its request."""
    admit(backend, context)
    allowed = backend.max_body_bytes if request.params.inputs else min(backend.max_body_bytes, MAX_TEXT_BYTES)
    if request.ByteSize() > allowed:
        text = f"the message is larger than {allowed} bytes"
        raise BodyTooLarge(None, text, "body_too_large")
    given = metadata(context)
    request_id = id_of(request.request_id, given.get(ID_HEADER) or given.get("request_id", ""))
    tell(context, {ID_HEADER: request_id})
    return request_id
