"""Counts the calls of the API, for Prometheus: by route or RPC, status, and the name of the caller's key.

It also passes a call's `traceparent` to the code that runs its request, and that of the answer to the caller.
`Observed` is the ASGI middleware of `service.api.rest`; `service.rpc.methods` uses `observing` directly. The number of
series is bounded: routes and RPCs are those of the contract, and keys those of the deployment.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from fastapi.routing import iter_route_contexts
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workers.metrics import API_REQUESTS, API_SECONDS
from workers.tracing import HEADER, Place

UNKNOWN = "unknown"
"""The route of calls that no route takes."""

GONE = "499"
"""The status of a call whose caller has left before the answer began."""

key_name: ContextVar[str] = ContextVar("key_name", default="")
"""The name of the caller's API key, in the task that answers; set by the backend's `admit`. Empty: no key."""


@dataclass
class Call:
    """One call, while it is answered.

    Attributes:
        route: its route in the contract.
        code: its status.
        traceparent: the caller's; empty: it has sent none.
        answer: headers of the answer; code that runs a request may add some.
    """

    route: str
    code: str
    traceparent: str = ""
    answer: dict[str, str] = field(default_factory=dict)


current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)
"""The call that this task answers; None if it answers none, such as a task that runs a job."""


def callers_trace() -> str:
    """The `traceparent` of the call that this task answers; empty: it has none."""
    call = current_call.get()
    return call.traceparent if call and Place.parse(call.traceparent) else ""


@contextmanager
def observing(route: str, code: str, traceparent: str = "") -> Iterator[Call]:
    """Count what happens inside as one call.

    Args:
        route: the route of the call; may be changed inside.
        code: its status, unless it is changed inside.
        traceparent: the caller's; empty: it has sent none.
    """
    began, call = time.monotonic(), Call(route, code, traceparent)
    token = key_name.set("")
    current_call.set(call)
    try:
        yield call
    finally:
        API_REQUESTS.labels(call.route, call.code, key_name.get()).inc()
        API_SECONDS.labels(call.route).observe(time.monotonic() - began)
        current_call.set(None)
        try:
            key_name.reset(token)
        except ValueError:  # a generator that is closed from another context
            key_name.set("")


class Observed:
    """Counts each HTTP call.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._paths: dict[int, str] = {}  # by the route's identity: a route of a router does not know its prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with observing(UNKNOWN, GONE, Headers(scope=scope).get(HEADER, "")) as call:

            async def send_on(message: Message) -> None:
                if message["type"] == "http.response.start":
                    call.code = str(message["status"])
                    MutableHeaders(scope=message).update(call.answer)
                await send(message)

            try:
                await self._app(scope, receive, send_on)
            except Exception:
                call.code = "500"  # whoever is around this answers it
                raise
            finally:
                call.route = self._path(scope)

    def _path(self, scope: Scope) -> str:
        if not self._paths:
            contexts = iter_route_contexts(scope["app"].routes)
            self._paths = {id(context.original_route): str(context.path) for context in contexts}
        return self._paths.get(id(scope.get("route")), UNKNOWN)
