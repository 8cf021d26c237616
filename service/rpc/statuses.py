"""Errors -> gRPC statuses, from the one table of errors; and who may call. For `service.rpc.methods`.

A status has google.rpc details, which travel in the trailing metadata: ErrorInfo always, BadRequest if one field is
wrong, RetryInfo if the same call may succeed later. Serve drops the trailing metadata of a method that raises, and the
code that is set after the last message of a stream. So nothing is raised here: a unary method answers an empty message,
a stream ends with an event that says what failed, and the status travels with it.
"""

from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import quote, unquote

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as RichStatus
from grpc_status import rpc_status

from deploy.gateway_spec import is_loopback
from service.api.backend import Backend
from service.api.errors import answer, find_status, log, retry_after_s
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from workers.errors import Forbidden

DOMAIN = "spray"

LONGEST = 1000
"""Bytes of a message or a field in a status, in percent-encoding. Clients refuse trailing metadata above 8 KiB."""

SERVES_ID = "request_id"
"""Serve's own trailing metadata. It puts it before ours."""


class Context(Protocol):
    """What is used of a call's context: that of Serve's proxies, or of grpc's own servers."""

    def invocation_metadata(self) -> Any:
        """Pairs of names and values from the client."""

    def trailing_metadata(self) -> Any:
        """Pairs set before."""

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Replace the pairs."""

    def set_code(self, code: Any) -> None:
        """A `grpc.StatusCode`."""

    def set_details(self, details: str) -> None:
        """The status in words."""

    def peer(self) -> str:
        """Address of the client, such as `ipv4:127.0.0.1:50000`."""


def admit(backend: Backend, context: Context) -> None:
    """Reject callers that may not call: as REST does, by the key in `authorization` or `x-api-key`.

    Raises:
        Unauthorized: a key is required.
        Forbidden: the server is for its own machine, and the call comes from another one.
    """
    given = metadata(context)
    key = given.get("x-api-key")
    backend.admit(given.get("authorization") or (f"Bearer {key}" if key else None))
    if backend.local_only and not _is_local(context.peer()):
        raise Forbidden(f"this server is for its own machine, not for {context.peer()}")


def metadata(context: Context) -> Mapping[str, str]:
    """The client's metadata; the first of several of one name."""
    found: dict[str, str] = {}
    for name, value in context.invocation_metadata() or ():
        if isinstance(value, str):  # the others are bytes, of names that end with -bin
            found.setdefault(name, value)
    return found


def tell(context: Context, headers: Mapping[str, str]) -> None:
    """Add to what the answer says besides its message, as REST's headers do."""
    if headers:
        _add_trailing(context, [*headers.items()])


def refuse(context: Context, error: Exception) -> pb.JobError:
    """Set the status of an error, and return it as a message."""
    log(error)
    row = find_status(error)
    said = answer(error)[1]["error"]
    told = pb.JobError(code=said["code"], message=_short(said["message"]), param=_short(said["param"] or ""))
    set_status(context, row.grpc, told, retry_after_s(error) if row.retry else None)
    return told


def set_status(context: Context, name: str, error: pb.JobError, after_s: int | None) -> None:
    """Set the status of a call, with its details.

    Args:
        context: of the call.
        name: of the `grpc.StatusCode`.
        error: what is told.
        after_s: the same call may succeed after so many seconds; None: it will not.
    """
    details: list[Any] = [ErrorInfo(reason=error.code, domain=DOMAIN)]
    if name == "INVALID_ARGUMENT" and error.param:
        violation = BadRequest.FieldViolation(field=error.param, description=error.message)
        details.append(BadRequest(field_violations=[violation]))
    if after_s is not None:
        later = RetryInfo()
        later.retry_delay.FromSeconds(after_s)
        details.append(later)
    rich = RichStatus(code=Code.Value(name), message=error.message, details=map(_packed, details))
    context.set_code(grpc.StatusCode[name])
    context.set_details(error.message)
    _add_trailing(context, rpc_status.to_status(rich).trailing_metadata)


def _packed(detail: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _add_trailing(context: Context, pairs: Any) -> None:
    before = [pair for pair in context.trailing_metadata() or () if pair[0] != SERVES_ID]
    context.set_trailing_metadata([*before, *pairs])


def _short(text: str) -> str:
    short = text[:LONGEST]
    while len(quote(short)) > LONGEST - (len("...") if len(short) < len(text) else 0):
        short = short[: min(len(short) - 1, len(short) * LONGEST // len(quote(short)))]
    return short if short == text else f"{short}..."


def _is_local(peer: str) -> bool:
    kind, _, address = peer.partition(":")
    return kind == "unix" or is_loopback(unquote(address).rpartition(":")[0].strip("[]"))
