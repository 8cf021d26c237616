"""The description of the API: `/openapi.json`, and `/docs`, the same as a page. For `service.api.rest`.

Routes declare their answers; their bodies are read within limits before they are validated (`service.api.reading`), so
the schemas of bodies are added here. The page is plain HTML, made from the description, and loads nothing.
"""

from collections import defaultdict
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic.json_schema import models_json_schema

from service.api.answers import ErrorResponse
from service.api.bodies import GenerationBody, ImageGenerationBody, VideoGenerationBody
from service.api.errors import GATEWAY_LOST, STATUS, UNEXPECTED
from service.api.origin import MOST_SECONDS, TIMEOUT_HEADER
from workers.errors import NotSupported

BODIES = (ImageGenerationBody, VideoGenerationBody)
REF = "#/components/schemas/{model}"

BYTES = {"type": "string", "contentMediaType": "application/octet-stream"}
"""The schema of a file."""

NOT_FOR_READING = frozenset({400, 408, 413, 415, 422, 429, 499})
"""Statuses that only requests with a body have."""

MORE_CODES = {
    400: "unknown_parameter missing_required_parameter invalid_size wrong_task too_much_work invalid_body".split(),
    404: ["unknown_path"],
    503: [GATEWAY_LOST, "overloaded"],
}
"""Codes of `InvalidParameter`, of unknown paths, and of what proxies answer themselves."""

router = APIRouter()


def _errors() -> dict[int | str, dict[str, Any]]:
    codes: dict[int, list[str]] = defaultdict(list)
    for row in (*STATUS.values(), UNEXPECTED):
        codes[row.http].append(row.code)
    del codes[STATUS[NotSupported].http]  # only gRPC's contract has what REST does not
    for status, more in MORE_CODES.items():
        codes[status] += more
    headers = {
        "x-should-retry": {"schema": {"type": "string"}, "description": "false: the same request fails again"},
        "retry-after": {"schema": {"type": "string"}, "description": "seconds; the same request may succeed then"},
    }
    return {
        status: {"model": ErrorResponse, "description": ", ".join(sorted(set(codes[status]))), "headers": headers}
        for status in sorted(codes)
    }


ERRORS = _errors()
"""The declared errors of requests with a body."""

READING_ERRORS = {status: said for status, said in ERRORS.items() if status not in NOT_FOR_READING}
"""Those of the others."""


def takes(kind: type[GenerationBody]) -> dict[str, Any]:
    """The description of a route's body and headers, for `openapi_extra`."""
    schema = {"$ref": REF.format(model=kind.__name__)}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": schema}}
    patience = {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "required": False,
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": MOST_SECONDS},
        "description": "seconds from now on; then the request is stopped, and answered with 504",
    }
    return {"requestBody": {"required": True, "content": content}, "parameters": [patience]}


def event_stream(description: str) -> dict[str, Any]:
    """The description of a stream of server-sent events, for the `content` of an answer."""
    event = {
        "type": "object",
        "description": description,
        "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON, or [DONE]"}},
    }
    return {"text/event-stream": {"schema": event}}


def describe(app: FastAPI) -> None:
    """Let the application describe itself, with the bodies of its requests."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(app: FastAPI) -> dict[str, Any]:
    described = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema([(kind, "validation") for kind in BODIES], ref_template=REF)
    components = described.setdefault("components", {})
    components.setdefault("schemas", {}).update(bodies["$defs"])
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    described["security"] = [{}, {"key": []}]  # a key, if the deployment has keys
    for operation in (operation for path in described["paths"].values() for operation in path.values()):
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]  # FastAPI's own idea; `rest` puts such errors into the envelope
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    return described


@router.get("/openapi.json", include_in_schema=False)
async def openapi_json(http: Request) -> Response:
    return JSONResponse(http.app.openapi())


@router.get("/docs", include_in_schema=False)
async def docs(http: Request) -> Response:
    policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return HTMLResponse("".join(page(http.app.openapi())), headers=policy)


STYLE = """
body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em} h2{margin-top:2em} code{font-size:95%}
td,th{text-align:left;padding:.2em .8em .2em 0;vertical-align:top;border-bottom:1px solid #8884}
:root{color-scheme:light dark}
"""


def page(described: dict[str, Any]) -> Iterator[str]:
    """A description as HTML, in pieces."""
    info = described["info"]
    title = escape(info["title"])
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    yield f"<h1>{title} {escape(info['version'])}</h1><p>{escape(info.get('description', ''))}</p>"
    yield "<p>For programs: <a href=/openapi.json>/openapi.json</a></p>"
    schemas = described["components"]["schemas"]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation.get('description', ''))}</p>"
            body = operation.get("requestBody")
            if body:
                yield f"<p>Body: {' or '.join(f'<code>{kind}</code>' for kind in body['content'])}</p>"
                yield from _table(schemas[body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]])
            yield "<table><tr><th>status<th>answer"
            for status, answer in operation["responses"].items():
                kinds = ", ".join(answer.get("content", {}))
                yield f"<tr><td>{status}<td>{escape(answer['description'])} <code>{escape(kinds)}</code>"
            yield "</table>"


def _table(schema: dict[str, Any]) -> Iterator[str]:
    yield "<table><tr><th>field<th>type<th>default<th>"
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        default = "required" if name in required else "" if field.get("default") is None else str(field["default"])
        said = escape(field.get("description", ""))
        yield f"<tr><td><code>{name}</code><td>{escape(_kind(field))}<td>{escape(default)}<td>{said}"
    yield "</table>"


def _kind(field: dict[str, Any]) -> str:
    """A field's type in a few words."""
    if "anyOf" in field:
        return " or ".join(_kind(kind) for kind in field["anyOf"] if kind != {"type": "null"})
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    bounds = [str(field[key]) for key in ("minimum", "maximum") if key in field]
    kind = f"list of {_kind(field['items'])}" if "items" in field else str(field.get("type", "any"))
    return kind + (f", {' to '.join(bounds)}" if len(bounds) == 2 else "")
