"""Lets pages of the sites that the deployment names call the API from a browser (CORS). For `service.api.rest`.

It wraps the whole application, so that a browser's preflight is answered before access is checked, and errors are
readable too. Without `gateway.cors_origins` it does nothing.
"""

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.backend import Backend
from service.api.errors import answer
from workers.errors import Forbidden

METHODS = ("GET", "HEAD", "POST", "DELETE")

READABLE = (
    "content-disposition content-range etag idempotency-replayed location openai-poll-after-ms preference-applied "
    "retry-after traceparent x-ignored-params x-metrics x-num-frames x-fps x-request-id x-seed x-should-retry "
    "x-warnings"
).split()
"""Headers of answers that a page may read, besides those that are always readable."""

ASKED_AGAIN_S = 600
"""Seconds for which a browser keeps the answer to a preflight."""


class AllowedPages:
    """Answers browsers by the backend's current origins, which may change while it runs.

    Args:
        app: the API.
        backend: has the origins.
    """

    def __init__(self, app: ASGIApp, backend: Backend) -> None:
        self._app, self._backend = app, backend
        self._origins: Sequence[str] = ()
        self._answering: ASGIApp = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by the server for each request."""
        origins = self._backend.cors_origins
        if not origins:
            await self._app(scope, receive, send)
            return
        if origins != self._origins:
            self._origins, self._answering = origins, _InEnvelope(
                self._app, origins, METHODS, ["*"], expose_headers=READABLE, max_age=ASKED_AGAIN_S
            )  # fmt: skip
        await self._answering(scope, receive, send)


class _InEnvelope(CORSMiddleware):
    """Starlette's middleware, with its plain-text refusals as errors in the envelope."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Called for a browser's preflight."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin, method = (request_headers.get(name) for name in ("origin", "access-control-request-method"))
        status, body, headers = answer(Forbidden(f"a page of {origin} may not call this server by {method}"))
        kept: dict[str, Any] = {
            name: value for name, value in response.headers.items() if not name.startswith("content")
        }
        return JSONResponse(body, status, kept | headers)
