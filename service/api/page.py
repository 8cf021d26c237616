"""`/docs`: the description of the API as a page for people. For `service.api.openapi`.

Plain HTML, made from `/openapi.json`; it loads nothing and runs nothing.
"""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from service.api.bodies import WITHOUT_EFFECT

STYLE = """
body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em} h2{margin-top:2em} code,pre{font-size:95%}
td,th{text-align:left;padding:.2em .8em .2em 0;vertical-align:top;border-bottom:1px solid #8884}
pre{overflow-x:auto;padding:.5em;background:#8882} nav a{display:block}
:root{color-scheme:light dark}
"""

REF = "#/components/schemas/"

WITH_A_KEY = "curl SERVER/v1/models -H 'Authorization: Bearer KEY'"


def page(described: dict[str, Any]) -> Iterator[str]:
    """A description as HTML, in pieces."""
    info = described["info"]
    title = escape(info["title"])
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    yield f"<h1>{title} {escape(info['version'])}</h1><p>{escape(info.get('description', ''))}</p>"
    yield "<p>Where the deployment has API keys, each call of <code>/v1</code> carries one in a header; this page and "
    yield f"finished files need none:</p><pre>{escape(WITH_A_KEY)}</pre>"
    yield "<p>The same for programs: <a href=/openapi.json>/openapi.json</a></p><nav>"
    routes = [(path, method, each) for path, every in described["paths"].items() for method, each in every.items()]
    for path, method, operation in routes:
        said = escape(operation.get("description", "").partition("\n")[0])
        yield f"<a href='#{_anchor(method, path)}'><code>{method.upper()} {escape(path)}</code> {said}</a>"
    yield "</nav>"
    schemas = described["components"]["schemas"]
    for path, method, operation in routes:
        yield f"<h2 id='{_anchor(method, path)}'><code>{method.upper()} {escape(path)}</code></h2>"
        yield f"<p>{escape(operation.get('description', ''))}</p>"
        yield from _operation(operation, schemas)
    yield "<h2 id=types>Types</h2>"
    bodies = {_body_name(operation) for _, _, operation in routes}
    for name, schema in schemas.items():
        if name not in bodies and "properties" in schema:
            yield f"<h3 id='{escape(name)}'><code>{escape(name)}</code></h3>"
            yield f"<p>{escape(schema.get('description', ''))}</p>"
            yield from _fields(schema["properties"], schema.get("required", ()))


def _operation(operation: dict[str, Any], schemas: dict[str, Any]) -> Iterator[str]:
    """The parameters, body and answers of one route."""
    if parameters := operation.get("parameters"):
        yield "<table><tr><th>parameter<th>in<th>type<th>"
        for each in parameters:
            said = escape(each.get("description", "")) or ("required" if each.get("required") else "")
            where = f"<td><code>{escape(each['name'])}</code><td>{escape(each['in'])}"
            yield f"<tr>{where}<td>{_kind(each['schema'])}<td>{said}"
        yield "</table>"
    if name := _body_name(operation):
        kinds = operation["requestBody"]["content"]
        yield f"<p>Body: {' or '.join(f'<code>{escape(kind)}</code>' for kind in kinds)}</p>"
        fields, required = schemas[name]["properties"], schemas[name].get("required", ())
        first = sorted(fields, key=lambda field: field not in required)
        yield from _fields({field: fields[field] for field in first}, required)
    good = {status: each for status, each in operation["responses"].items() if int(status) < 400}
    yield "<table><tr><th>status<th>answer<th>type"
    for status, each in good.items():
        yield f"<tr><td>{status}<td>{escape(each['description'])}<td>{_answer(each)}"
    yield "</table><details><summary>Errors</summary><table><tr><th>status<th>code"
    for status, each in operation["responses"].items():
        if status not in good:
            yield f"<tr><td>{status}<td>{escape(each['description'])}"
    yield "</table></details>"


def _fields(fields: dict[str, Any], required: Any) -> Iterator[str]:
    """A table of the fields with an effect, and a line with the names of the others."""
    ignored = [name for name, field in fields.items() if field.get("description") == WITHOUT_EFFECT.description]
    yield "<table><tr><th>field<th>type<th>default<th>"
    for name, field in fields.items():
        if name not in ignored:
            default = "required" if name in required else _default(field.get("default"))
            said = escape(field.get("description", ""))
            yield f"<tr><td><code>{escape(name)}</code><td>{_kind(field)}<td>{escape(default)}<td>{said}"
    yield "</table>"
    if ignored:
        yield f"<p>Accepted without effect: {', '.join(f'<code>{escape(name)}</code>' for name in ignored)}</p>"


def _default(value: Any) -> str:
    return "" if value is None or isinstance(value, dict | list) else json.dumps(value).strip('"')


def _answer(response: dict[str, Any]) -> str:
    kinds = []
    for kind, content in response.get("content", {}).items():
        named = content.get("schema", {}).get("$ref")
        kinds.append(f"<code>{escape(kind)}</code>" + (f" {_kind({'$ref': named})}" if named else ""))
    return ", ".join(kinds)


def _body_name(operation: dict[str, Any]) -> str:
    """The name of the schema of a route's body; empty if it has none."""
    content = operation.get("requestBody", {}).get("content", {})
    return str(content["application/json"]["schema"]["$ref"].removeprefix(REF)) if content else ""


def _anchor(method: str, path: str) -> str:
    return escape(f"{method}{path}")


def _kind(field: dict[str, Any]) -> str:
    """A field's type in a few words of HTML."""
    if "anyOf" in field:
        return " or ".join(_kind(kind) for kind in field["anyOf"] if kind != {"type": "null"})
    if "$ref" in field:
        name = escape(field["$ref"].removeprefix(REF))
        return f"<a href='#{name}'>{name}</a>"
    if "enum" in field or "const" in field:
        return " or ".join(escape(str(value)) for value in field.get("enum", [field.get("const")]))
    bounds = [str(field[key]) for key in ("minimum", "maximum") if key in field]
    kind = f"list of {_kind(field['items'])}" if "items" in field else escape(str(field.get("type", "any")))
    return kind + (f", {' to '.join(bounds)}" if len(bounds) == 2 else "")
