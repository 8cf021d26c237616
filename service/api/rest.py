"""The REST API: `rest_app(backend)` assembles the routers into one FastAPI application. It runs without Ray.

Paths and bodies are OpenAI's. Every error, also of an unknown path, comes in OpenAI's envelope.
"""

import contextlib
from collections import defaultdict
from collections.abc import AsyncGenerator
from importlib.metadata import version

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp

from service.api import cluster, images, jobs, models, openapi, outputs, profiles, requests, video_jobs, videos
from service.api.backend import Backend, require_key, require_own_host
from service.api.cors import AllowedPages
from service.api.disconnect import CancelWhenGone
from service.api.errors import answer, envelope, log
from service.api.observed import Observed
from service.api.openapi import describe
from workers.errors import InvalidParameter, SprayError

DESCRIPTION = "Pictures and videos from diffusion transformers, in OpenAI's shapes. Every error has OpenAI's envelope."

CODES = {404: "unknown_path", 405: "method_not_allowed", 416: "range_not_satisfiable"}
"""The codes of Starlette's own errors, by status."""


class RestApp(FastAPI):
    """The application. CORS wraps all of it, so that browsers can read the errors of its outermost layer too."""

    def build_middleware_stack(self) -> ASGIApp:
        """Called by Starlette before the first request."""
        return AllowedPages(super().build_middleware_stack(), self.state.backend)


def rest_app(backend: Backend) -> FastAPI:
    """The application that answers at the HTTP port."""
    app = RestApp(
        title="spray", version=version("spray"), description=DESCRIPTION, openapi_url=None, lifespan=_until_the_end
    )
    describe(app)
    app.state.backend = backend
    app.add_middleware(Observed)
    app.add_middleware(CancelWhenGone)  # around it, so that what it cancels is observed
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(SprayError, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(require_key)])  # here, so that no new route can forget it
    for subject in (images, videos, video_jobs, jobs, models, requests, profiles, cluster):
        v1.include_router(subject.router)
    app.include_router(v1)
    app.include_router(outputs.router, prefix="/v1", dependencies=[Depends(require_own_host)])  # URLs are signed
    app.include_router(openapi.router, dependencies=[Depends(require_own_host)])
    app.include_router(cluster.probes)
    return app


@contextlib.asynccontextmanager
async def _until_the_end(app: FastAPI) -> AsyncGenerator[None]:
    """Runs around all requests. Serve ends it when the gateway has answered the last one."""
    yield
    await app.state.backend.end()


async def _answer_error(http: Request, error: Exception) -> Response:
    log(error)
    status, body, headers = answer(error)
    return JSONResponse(body, status_code=status, headers=headers)


async def _answer_validation_error(http: Request, error: Exception) -> Response:
    """A parameter of a path or a query that FastAPI itself has found wrong."""
    assert isinstance(error, RequestValidationError)
    mistake = error.errors()[0]
    return await _answer_error(
        http, InvalidParameter(str(mistake["loc"][-1]), f"{mistake['loc'][-1]}: {mistake['msg']}")
    )


async def _answer_http_error(http: Request, error: Exception) -> Response:
    """Starlette's own errors: an unknown path, a method that a path does not have."""
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path}: {error.detail}"
    body = envelope(message, "invalid_request_error", None, CODES.get(error.status_code))
    headers = {"x-should-retry": "false"} | dict(error.headers or {})
    if error.status_code == 405:  # Starlette names the methods of the first of the path's routes
        headers["Allow"] = ", ".join(sorted(_methods(http)))
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def _methods(http: Request) -> set[str]:
    """All methods of a path: those of its own routes, or else of routes whose parameters it matches."""
    path, methods = http.scope["path"], defaultdict[str, set[str]](set)
    for route in iter_route_contexts(http.app.routes):
        methods[str(route.path)] |= set(route.methods or ())
    fitting = [methods[known] for known in methods if compile_path(known)[0].match(path)]
    return methods[path] if path in methods else set().union(*fitting)
