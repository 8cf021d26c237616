"""Reads the body of a request within limits: JSON or a form comes in, a Python object goes out. For the routers.

Forms carry only text. Nested values come as `lora[name]`, as OpenAI's clients send them, or as JSON.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from service.api.backend import Served
from service.api.bodies import PICTURE_INPUTS, WHERE_PICTURES_GO, Kind, parse_body
from service.api.fetching import with_fetched
from workers.errors import BodyTimeout, BodyTooLarge, InvalidParameter

MAX_KEYS = 100
"""The most keys of an object in a body, and fields of a form."""

MAX_TEXT_BYTES = 1 << 20
"""The most bytes of a body without pictures: the longest prompts take a quarter of it."""

MAX_FILES = 16
"""The most files of a form. Their bytes count against the limit of the body."""

BODY_S = 30.0
"""Seconds for reading a body. Serve's proxies already wait for all but the largest: see `service.edge`."""

NESTED = frozenset({"loras", "lora", "seeds", "stream_options", "extra_params"})
"""Fields that are objects or lists."""

LISTS = frozenset({"loras", "lora", "seeds"})

CHARSET = re.compile(r"""charset\s*=\s*["']?([^\s;"']*)""", re.IGNORECASE)

SCALAR = re.compile(r'true|false|-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?|"[^"]*"')
"""JSON of a number, a switch or a plain text."""

NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\]){0,3})")
"""A field's name, followed by up to three names in brackets or empty brackets."""


def reader(kind: type[Kind]) -> Callable[..., Awaitable[Kind]]:
    """The dependency that gives a route its body, read within limits and validated."""

    async def read(http: Request, backend: Served) -> Kind:
        allowed = backend.max_body_bytes if kind.PICTURES else min(backend.max_body_bytes, MAX_TEXT_BYTES)
        chunks = _limited(http.stream(), allowed)
        is_form = http.headers.get("content-type", "").lower().startswith("multipart/form-data")
        try:
            async with asyncio.timeout(BODY_S):
                raw = await read_form(http.headers, chunks, kind.PICTURES) if is_form else await read_json(chunks)
        except TimeoutError:
            raise BodyTimeout(None, f"the body did not arrive within {BODY_S:g} s", "body_timeout") from None
        fields = await with_fetched(_with_extra_body(raw), kind.PICTURES, backend.media_hosts, allowed)
        return parse_body(fields, kind, from_text=is_form)

    return read


async def _limited(chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncGenerator[bytes]:
    """The same chunks, up to `max_bytes`; the rest is not read."""
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise BodyTooLarge(None, f"the body is larger than {max_bytes} bytes", "body_too_large")
        yield chunk


async def read_json(chunks: AsyncIterator[bytes]) -> object:
    """The JSON of a body.

    Raises:
        InvalidParameter: the body is not JSON, or has too many keys.
    """
    raw = bytearray()
    async for chunk in chunks:
        raw += chunk
    return _parse(raw, None)


def _parse(raw: str | bytearray, param: str | None) -> object:
    try:
        return json.loads(raw, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        raise InvalidParameter(param, f"{param or 'the body'} is not JSON", "invalid_body") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:  # to find the one to complain about takes long
        raise InvalidParameter(None, f"an object has more than {MAX_KEYS} keys", "invalid_body")
    if any("\ud800" <= letter <= "\udfff" for name, _ in pairs for letter in name):
        raise InvalidParameter(None, "a key is not Unicode text", "invalid_body")
    return dict(pairs)


def _with_extra_body(raw: object) -> object:
    """The body, with the fields of its `extra_body` among its own."""
    if not isinstance(raw, dict) or raw.get("extra_body") is None:
        return raw
    extra = raw["extra_body"]
    extra = _parse(extra, "extra_body") if isinstance(extra, str) else extra
    if not isinstance(extra, dict):
        raise InvalidParameter("extra_body", "extra_body must be an object, or JSON text of one")
    extra = {name: value for name, value in extra.items() if value is not None}
    own = {name: value for name, value in raw.items() if name != "extra_body" and value is not None}
    for name, value in extra.items():
        before = own.get(name, value)
        if name == "extra_body" or (before != value and str(before) != str(value)):  # in a form, one of them is text
            raise InvalidParameter("extra_body", f"extra_body has {name!r} as well, with another value; leave one out")
    return own | extra


class _Parser(MultiPartParser):
    """Knows whether the form was complete, and refuses bytes that are not text; Starlette falls back to Latin-1."""

    ended = False

    def on_part_end(self) -> None:
        """Called when a part is whole.

        Raises:
            UnicodeDecodeError: it is not text.
        """
        if self._current_part.file is None:
            self._current_part.data.decode()
        super().on_part_end()

    def on_end(self) -> None:
        """Called at the last boundary."""
        self.ended = True


async def read_form(
    headers: Headers, chunks: AsyncGenerator[bytes], files: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The fields of a `multipart/form-data` body.

    Args:
        headers: the headers of the request.
        chunks: its body.
        files: fields that may be files; their value is the bytes.

    Raises:
        InvalidParameter: the form is malformed, or has too many fields, a field twice, or a file in another field.
    """
    charset = CHARSET.search(headers["content-type"])
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8"):
        raise InvalidParameter(None, f"a form's charset must be UTF-8, got {charset[1]!r}", "invalid_body")
    parser = _Parser(headers, chunks, max_files=MAX_FILES, max_fields=MAX_KEYS, max_part_size=1 << 30)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidParameter(None, f"the form cannot be read: {error.message}", "invalid_body") from None
    except UnicodeDecodeError:
        raise InvalidParameter(None, "the form's text is not UTF-8", "invalid_body") from None
    fields: dict[str, Any] = {}
    try:
        if not parser.ended:
            raise InvalidParameter(None, "the form ends before its last boundary", "invalid_body")
        for name, value in form.multi_items():
            known = name.partition("[")[0]
            if not isinstance(value, str) and known not in files:
                said = WHERE_PICTURES_GO if known in PICTURE_INPUTS else "it is no file"
                raise InvalidParameter(name, f"{name!r} is sent as a file, which is not supported here: {said}")
            matched = NAME.fullmatch(name)
            if matched is None:
                raise InvalidParameter(name, f"{name!r} is no name of a field", "unknown_parameter")
            if name in LISTS and name in fields and isinstance(value, str):
                fields[name] = [*_listed(fields[name]), *_listed(_value(name, value))]
                continue
            path = [matched[1], *re.findall(r"\[([^\[\]]*)\]", matched[2])]
            _put(fields, path, _value(name, value) if isinstance(value, str) else await value.read(), name)
    finally:
        await form.close()
    return fields | {name: _listed(fields[name]) for name in LISTS & fields.keys()}


def _listed(value: object) -> list[object]:
    """The value of a field that is a list: forms repeat the field, and a single value is a list of one."""
    return value if isinstance(value, list) else [value]


def _put(place: Any, path: list[str], value: object, name: str) -> None:
    """Add the value of one field of a form, by the parts of its name; an empty part is the end of a list."""
    part, *rest = path
    if isinstance(place, list) and not rest:
        place.append(value)
    elif isinstance(place, list):
        if not place or not isinstance(place[-1], dict) or rest[0] in place[-1]:
            place.append({})  # the next object of a list begins where a name comes again
        _put(place[-1], rest, value, name)
    elif rest:
        inner = place.setdefault(part, {} if rest[0] else [])
        if not isinstance(inner, dict if rest[0] else list):
            raise InvalidParameter(name, f"{name!r} is given twice, in different ways")
        _put(inner, rest, value, name)
    elif part in place:
        raise InvalidParameter(name, f"{name!r} is given twice")
    else:
        place[part] = value


def _value(name: str, text: str) -> object:
    """The value of a form's field: JSON if the body has an object or a list there, else the text.

    The body does not say of which type a parameter of the model's pipeline is: what looks like a number or a switch is
    one. A text that looks so is sent in quotes, or in the JSON of all of them.
    """
    if name.startswith("extra_params[") and SCALAR.fullmatch(text):
        return _parse(text, name)
    return _parse(text, name) if name in NESTED and text.lstrip()[:1] in ("{", "[") else text
