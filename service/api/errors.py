"""The one table of errors: each exception -> its HTTP status and its body in OpenAI's error envelope.

Every error that leaves the API passes through `answer`. OpenAI's client retries 429 and 5xx by itself;
`x-should-retry: false` stops it from repeating a request that cannot succeed.
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
    Forbidden,
    GangLost,
    InvalidParameter,
    ModelNotAllowed,
    ModelNotFound,
    ModelUnavailable,
    OutOfMemory,
    OutputNotFound,
    QueueFull,
    RateLimited,
    RequestCancelled,
    RequestError,
    RequestFailed,
    RequestQuarantined,
    ShuttingDown,
    TryLater,
    Unauthorized,
    UnsupportedMediaType,
)

logger = logging.getLogger("ray.serve")

RETRY_AFTER_S = 5

MAX_RETRY_AFTER_S = 120
"""OpenAI's client waits no longer: it does not ask again at all."""

GATEWAY_LOST = "gateway_lost"
"""The code that proxies answer with while there is no gateway; see `service.edge`."""


@dataclass(frozen=True)
class Status:
    """How one kind of error is answered.

    Attributes:
        http: status code.
        type: OpenAI's error type.
        code: a stable word for programs; an `InvalidParameter` has its own.
        retry: the same request may succeed later.
    """

    http: int
    type: str
    code: str
    retry: bool = False


STATUS: dict[type[Exception], Status] = {
    InvalidParameter: Status(400, "invalid_request_error", "invalid_value"),
    BodyTimeout: Status(408, "invalid_request_error", "body_timeout"),
    BodyTooLarge: Status(413, "invalid_request_error", "body_too_large"),
    OutputNotFound: Status(404, "invalid_request_error", "output_not_found"),
    Unauthorized: Status(401, "invalid_request_error", "invalid_api_key"),
    Forbidden: Status(403, "invalid_request_error", "forbidden"),
    ModelNotAllowed: Status(403, "invalid_request_error", "model_not_allowed"),
    AdminOnly: Status(403, "invalid_request_error", "admin_only"),
    UnsupportedMediaType: Status(415, "invalid_request_error", "unsupported_media_type"),
    ModelNotFound: Status(404, "invalid_request_error", "model_not_found"),
    RequestQuarantined: Status(422, "invalid_request_error", "request_quarantined"),
    ShuttingDown: Status(503, "server_error", "shutting_down", retry=True),
    QueueFull: Status(429, "rate_limit_error", "queue_full", retry=True),
    RateLimited: Status(429, "rate_limit_error", "rate_limit_exceeded", retry=True),
    RequestCancelled: Status(499, "invalid_request_error", "cancelled"),
    RequestFailed: Status(500, "server_error", "generation_failed"),
    OutOfMemory: Status(400, "invalid_request_error", "out_of_memory"),
    ModelUnavailable: Status(503, "server_error", "model_unavailable", retry=True),
    GangLost: Status(503, "server_error", "worker_lost"),  # the gateway has tried again, as often as it may
}

UNEXPECTED = Status(500, "server_error", "internal_error")


def find_status(error: Exception) -> Status:
    """The row of the error's class, or of its nearest base class."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), UNEXPECTED)


def answer(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """HTTP status, body and headers of an error. What an unexpected one says stays in the log: it may hold secrets."""
    status = find_status(error)
    message = str(error) if status is not UNEXPECTED else "the server made a mistake; its log has the details"
    param = error.param if isinstance(error, RequestError) else None
    code = error.code if isinstance(error, InvalidParameter) else status.code
    headers = {"retry-after": str(retry_after_s(error))} if status.retry else {"x-should-retry": "false"}
    return status.http, envelope(message, status.type, param, code), headers


def retry_after_s(error: Exception) -> int:
    """After how many seconds a request that may succeed later should be sent again."""
    known = error.retry_after_s if isinstance(error, TryLater) else None
    return RETRY_AFTER_S if known is None else max(1, min(MAX_RETRY_AFTER_S, math.ceil(known)))


def log(error: Exception) -> None:
    """Log what is the server's fault. A client that leaves while its body is read is not."""
    if answer(error)[0] == 500 and not isinstance(error, ClientDisconnect):
        logger.error("request failed", exc_info=error)


def envelope(message: str, type_: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error body."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}
