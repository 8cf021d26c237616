"""The one table of errors: each exception -> its HTTP and gRPC status, and its body in OpenAI's error envelope.

Every error that leaves the REST API passes through `answer`, and `service.rpc.statuses` turns it into a gRPC status.
OpenAI's client retries 429 and 5xx by itself; `x-should-retry: false` stops it from repeating a request that cannot
succeed.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect

from workers.errors import (
    AdminOnly,
    BodyTimeout,
    BodyTooLarge,
    DeadlineExceeded,
    Forbidden,
    GangLost,
    GatewaySilent,
    IdempotencyKeyReused,
    InputNotFound,
    InvalidParameter,
    JobNotFound,
    JobNotReady,
    JobsUnavailable,
    KeysUnavailable,
    ModelNotAllowed,
    ModelNotFound,
    ModelUnavailable,
    OutOfMemory,
    OutputNotFound,
    OutputsFull,
    OutputsUnavailable,
    QueueFull,
    RateLimited,
    RequestCancelled,
    RequestError,
    RequestFailed,
    RequestNotFound,
    RequestQuarantined,
    ShuttingDown,
    TryLater,
    Unauthorized,
    UnsupportedMediaType,
)

logger = logging.getLogger("ray.serve")

RETRY_AFTER_S = 5

MAX_RETRY_AFTER_S = 120
"""The longest wait in seconds that OpenAI's client follows; with a longer one it does not ask again."""

GATEWAY_LOST = "gateway_lost"
"""The code of proxies' answers while there is no gateway; see `service.edge` and `service.rpc.proxy`."""

GATEWAY_GONE = "the gateway is starting or gone; another one takes its place"


@dataclass(frozen=True)
class Status:
    """How one kind of error is answered.

    Attributes:
        http: the HTTP status.
        type: OpenAI's error type.
        code: a stable word for programs; an `InvalidParameter` has its own.
        grpc: the name of the gRPC status.
        retry: whether the same request may succeed later.
    """

    http: int
    type: str
    code: str
    grpc: str
    retry: bool = False


STATUS: dict[type[Exception], Status] = {
    InvalidParameter: Status(400, "invalid_request_error", "invalid_value", "INVALID_ARGUMENT"),
    BodyTimeout: Status(408, "invalid_request_error", "body_timeout", "DEADLINE_EXCEEDED"),
    BodyTooLarge: Status(413, "invalid_request_error", "body_too_large", "INVALID_ARGUMENT"),
    OutputNotFound: Status(404, "invalid_request_error", "output_not_found", "NOT_FOUND"),
    InputNotFound: Status(404, "invalid_request_error", "input_not_found", "NOT_FOUND"),
    RequestNotFound: Status(404, "invalid_request_error", "request_not_found", "NOT_FOUND"),
    Unauthorized: Status(401, "invalid_request_error", "invalid_api_key", "UNAUTHENTICATED"),
    Forbidden: Status(403, "invalid_request_error", "forbidden", "PERMISSION_DENIED"),
    ModelNotAllowed: Status(403, "invalid_request_error", "model_not_allowed", "PERMISSION_DENIED"),
    AdminOnly: Status(403, "invalid_request_error", "admin_only", "PERMISSION_DENIED"),
    UnsupportedMediaType: Status(415, "invalid_request_error", "unsupported_media_type", "INVALID_ARGUMENT"),
    ModelNotFound: Status(404, "invalid_request_error", "model_not_found", "NOT_FOUND"),
    JobNotFound: Status(404, "invalid_request_error", "job_not_found", "NOT_FOUND"),
    JobNotReady: Status(409, "invalid_request_error", "job_not_ready", "FAILED_PRECONDITION"),
    RequestQuarantined: Status(422, "invalid_request_error", "request_quarantined", "FAILED_PRECONDITION"),
    IdempotencyKeyReused: Status(422, "invalid_request_error", "idempotency_key_reuse", "ALREADY_EXISTS"),
    ShuttingDown: Status(503, "server_error", "shutting_down", "UNAVAILABLE", retry=True),
    QueueFull: Status(429, "rate_limit_error", "queue_full", "RESOURCE_EXHAUSTED", retry=True),
    RateLimited: Status(429, "rate_limit_error", "rate_limit_exceeded", "RESOURCE_EXHAUSTED", retry=True),
    GatewaySilent: Status(503, "server_error", GATEWAY_LOST, "UNAVAILABLE", retry=True),
    KeysUnavailable: Status(503, "server_error", "idempotency_unavailable", "UNAVAILABLE", retry=True),
    RequestCancelled: Status(499, "invalid_request_error", "cancelled", "CANCELLED"),
    DeadlineExceeded: Status(504, "server_error", "deadline_exceeded", "DEADLINE_EXCEEDED"),
    RequestFailed: Status(500, "server_error", "generation_failed", "INTERNAL"),
    OutOfMemory: Status(400, "invalid_request_error", "out_of_memory", "RESOURCE_EXHAUSTED"),
    ModelUnavailable: Status(503, "server_error", "model_unavailable", "UNAVAILABLE", retry=True),
    JobsUnavailable: Status(503, "server_error", "jobs_unavailable", "UNAVAILABLE", retry=True),
    OutputsFull: Status(507, "server_error", "outputs_full", "RESOURCE_EXHAUSTED", retry=True),
    OutputsUnavailable: Status(503, "server_error", "outputs_unavailable", "UNAVAILABLE", retry=True),
    GangLost: Status(503, "server_error", "worker_lost", "ABORTED"),  # the gateway has tried again, as often as it may
}

UNEXPECTED = Status(500, "server_error", "internal_error", "INTERNAL")


def find_status(error: Exception) -> Status:
    """The row of the error's class, or of its nearest base class."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), UNEXPECTED)


def answer(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """HTTP status, body and headers of an error. The text of an unexpected one is only logged: it may hold secrets."""
    status = find_status(error)
    message = str(error) if status is not UNEXPECTED else "the server made a mistake; its log has the details"
    param = error.param if isinstance(error, RequestError) else None
    code = error.code if isinstance(error, InvalidParameter) else status.code
    headers = {"retry-after": str(retry_after_s(error))} if status.retry else {"x-should-retry": "false"}
    return status.http, envelope(message, status.type, param, code), headers


def retry_after_s(error: Exception) -> int:
    """The seconds after which a request that may succeed later should be sent again."""
    known = error.retry_after_s if isinstance(error, TryLater) else None
    return RETRY_AFTER_S if known is None else max(1, min(MAX_RETRY_AFTER_S, math.ceil(known)))


def log(error: Exception) -> None:
    """Log an error if it is the server's fault. A client that leaves while its body is read is not."""
    if answer(error)[0] == 500 and not isinstance(error, ClientDisconnect):
        logger.error("request failed", exc_info=error)


def envelope(message: str, type_: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error body. What is not Unicode in a message that quotes the caller is escaped."""
    message = message.encode(errors="backslashreplace").decode()
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}
