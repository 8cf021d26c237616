"""Where an HTTP request comes from: its id, and whether a web page may have sent it from somebody's browser.

A browser sends requests of any page to any server that it reaches, including one on its own machine. Without keys,
nothing else distinguishes such a request from its user's. Called by the routers before a body is read.
"""

import math
import re
import time
import uuid
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi import Request

from deploy.gateway_spec import is_loopback
from workers.errors import Forbidden, InvalidParameter, UnsupportedMediaType

BODY_KINDS = ("", "application/json", "multipart/form-data")
"""Accepted types of bodies. Pages may send forms without a preflight, but always with their origin and a type."""

TIMEOUT_HEADER = "x-request-timeout-seconds"
"""The header with the seconds that the caller waits for its answer."""

PASSED_TIMEOUT_HEADER = "x-spray-timeout-seconds"
"""The same header behind Serve's proxy, which would end the request itself, with an error that asks for a retry."""

MOST_SECONDS = 86_400
"""The most seconds until a deadline."""

ID_HEADER = "x-request-id"

ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
"""Ids that a caller may give a request, in REST and in gRPC."""


def reject_foreign_pages(http: Request, local_only: bool, allowed: Collection[str] = ()) -> None:
    """Reject requests that a page of another site may have sent.

    Args:
        http: the request.
        local_only: whether the server is for its own machine and needs no key. Its name must then be one of loopback: a
            page whose name was made to point at this machine may send any header, even `authorization`.
        allowed: origins whose pages may call.

    Raises:
        Forbidden: the request comes from a page of another site, or asks for a host that this server is not.
        UnsupportedMediaType: its body is of a type that pages send without asking.
    """
    headers = http.headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if http.method == "POST" and kind not in BODY_KINDS:
        raise UnsupportedMediaType(f"content-type must be application/json or multipart/form-data, not {kind!r}")
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
    except ValueError:
        raise Forbidden("the request's origin is malformed") from None
    if (
        foreign and origin not in allowed and not headers.get("authorization")
    ):  # pages of other origins cannot add one unasked
        raise Forbidden(f"a page of {origin} may not call this server")
    reject_foreign_hosts(http, local_only)


def reject_foreign_hosts(http: Request, local_only: bool) -> None:
    """Reject requests for another host than this server: the part of `reject_foreign_pages` that needs no origin.

    Raises:
        Forbidden: the request names another host.
    """
    host = http.headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        raise Forbidden("the request's host is malformed") from None
    if local_only and not is_loopback(name):
        raise Forbidden(f"this server is not {host!r}; call it by localhost or 127.0.0.1")


def deadline(http: Request) -> float | None:
    """The caller's deadline, in seconds since the epoch; None if the request has none. See `timeout_s`."""
    seconds = timeout_s(http)
    return None if seconds is None else time.time() + seconds


def timeout_s(http: Request) -> float | None:
    """The seconds for which the caller waits; None if the request does not say.

    Raises:
        InvalidParameter: the header is no number of seconds, or too many.
    """
    given = http.headers.get(PASSED_TIMEOUT_HEADER, http.headers.get(TIMEOUT_HEADER))
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MOST_SECONDS:
        raise InvalidParameter(
            TIMEOUT_HEADER, f"{TIMEOUT_HEADER} must be a number of seconds, at most {MOST_SECONDS}, got {given[:40]!r}"
        )
    return seconds


def request_id(http: Request) -> str:
    """A new id that begins with the one in the header, which Serve's proxies add, log and answer."""
    return new_id(http.headers.get(ID_HEADER, ""))


def new_id(given: str) -> str:
    """A new id that begins with the given one, if that can be part of an id."""
    own = uuid.uuid4().hex
    return f"{given}-{own[:8]}" if ID.fullmatch(given) else own
