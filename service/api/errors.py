"""The one table: what went wrong -> the HTTP answer, in OpenAI's error envelope.

Every error that leaves a door passes through `answer`. `x-should-retry: false` stops OpenAI's client from repeating a
request that cannot succeed; it repeats 429 and 5xx by itself otherwise.
"""

from dataclasses import dataclass
from typing import Any

from workers.errors import (
    GangLost,
    InvalidParameter,
    ModelNotFound,
    ModelUnavailable,
    QueueFull,
    RequestCancelled,
    RequestError,
    RequestFailed,
    ShuttingDown,
    Unauthorized,
)

RETRY_AFTER_S = 5


@dataclass(frozen=True)
class Status:
    """How one kind of error is answered.

    Attributes:
        http: status code.
        type: OpenAI's error type.
        code: a stable word for programs; an InvalidParameter brings its own.
        retry: whether a client should ask again.
    """

    http: int
    type: str
    code: str
    retry: bool = False


STATUS: dict[type[Exception], Status] = {
    InvalidParameter: Status(400, "invalid_request_error", "invalid_value"),
    Unauthorized: Status(401, "invalid_request_error", "invalid_api_key"),
    ModelNotFound: Status(404, "invalid_request_error", "model_not_found"),
    ShuttingDown: Status(503, "server_error", "shutting_down", retry=True),
    QueueFull: Status(429, "rate_limit_error", "queue_full", retry=True),
    RequestCancelled: Status(499, "invalid_request_error", "cancelled"),
    RequestFailed: Status(500, "server_error", "generation_failed"),
    ModelUnavailable: Status(503, "server_error", "model_unavailable", retry=True),
    GangLost: Status(503, "server_error", "worker_lost", retry=True),
}

UNEXPECTED = Status(500, "server_error", "internal_error")


def find_status(error: Exception) -> Status:
    """The row of the table for an error: that of its class or of the nearest base class."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), UNEXPECTED)


def answer(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """HTTP status, body and headers for an error. Nothing internal leaves: an unknown error says only that."""
    status = find_status(error)
    message = str(error) if status is not UNEXPECTED else "the server made a mistake; its log has the details"
    param = error.param if isinstance(error, RequestError) else None
    code = error.code if isinstance(error, InvalidParameter) else status.code
    headers = {"retry-after": str(RETRY_AFTER_S)} if status.retry else {"x-should-retry": "false"}
    return status.http, envelope(message, status.type, param, code), headers


def envelope(message: str, type_: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error body."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}
