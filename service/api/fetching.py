"""Fetches pictures by URL from hosts that the operator has named in `gateway.media_hosts`; from no others.

The raw fields of a body come in; URLs of such hosts are replaced by the bytes of their pictures. Only https is fetched,
without redirects, within limits of size and time. The name is resolved once, every address must be on the public
internet, and the checked address is the one that is connected to. Called by `service.api.reading`.
"""

import asyncio
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from service.authorities import authorities
from service.public_address import AddressRefused, public_address
from workers.errors import InvalidParameter

SECONDS = 20.0
"""Seconds for fetching all URLs of a body."""

MOST_URLS = 12
"""The most URLs of a body."""


async def with_fetched(raw: object, fields: frozenset[str], hosts: Sequence[str], most_bytes: int) -> object:
    """The same fields, with bytes instead of URLs of named hosts. Other values are left to the body's own rules.

    Args:
        raw: the fields of the body.
        fields: the names of fields that are pictures.
        hosts: the hosts that the operator has named; a port other than 443 belongs to the name.
        most_bytes: the most bytes of all pictures together.

    Raises:
        InvalidParameter: a URL of another host or kind, or one that cannot be fetched.
    """
    if not hosts or not isinstance(raw, dict):
        return raw
    asked = [name for name in fields & raw.keys() for value in _listed(raw[name]) if _url_in(value) is not None]
    if not asked:
        return raw
    name = asked[0]
    if len(asked) > MOST_URLS:
        raise InvalidParameter(name, f"at most {MOST_URLS} pictures are fetched for a request")
    left, found = most_bytes, dict(raw)
    try:
        trusted = await asyncio.to_thread(authorities)
        client = httpx.AsyncClient(verify=trusted, trust_env=False, follow_redirects=False)
        async with asyncio.timeout(SECONDS), client:
            for name in dict.fromkeys(asked):
                got = list(_listed(raw[name]))
                for i, value in enumerate(got):
                    if (url := _url_in(value)) is not None:
                        got[i] = await _fetch(client, name, url, hosts, left)
                        left -= len(got[i])
                found[name] = got if isinstance(raw[name], list) else got[0]
    except TimeoutError:
        raise InvalidParameter(name, f"the pictures could not be fetched within {SECONDS:g} s") from None
    return found


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _url_in(value: object) -> str | None:
    """The URL of a picture; None if it is not a URL, or a data: URL."""
    if isinstance(value, dict) and value.keys() == {"image_url"}:
        value = value["image_url"]
    return value if isinstance(value, str) and not value.lower().startswith("data:") else None


async def _fetch(client: httpx.AsyncClient, name: str, url: str, hosts: Sequence[str], most_bytes: int) -> bytes:
    host, port, rest = _parts(name, url, hosts)
    try:
        address = await public_address(host, port)
    except AddressRefused as error:
        said = "is at an address that is not of the public internet" if error.address else "has no address"
        raise InvalidParameter(name, f"{host} {said}") from None
    try:
        async with client.stream(
            "GET",
            f"https://{f'[{address}]' if ':' in address else address}:{port}{rest}",
            headers={
                "host": host if port == 443 else f"{host}:{port}",
                "accept": "image/*, video/mp4",
                "accept-encoding": "identity",  # what arrives is the file itself
            },
            extensions={"sni_hostname": host},  # whose certificate the server must have
        ) as answer:
            if answer.status_code != 200:
                raise InvalidParameter(name, f"{host} answered {answer.status_code} for the URL, not 200")
            data = bytearray()
            async for chunk in answer.aiter_raw():
                data += chunk
                if len(data) > most_bytes:
                    raise InvalidParameter(name, f"what {host} sends is larger than {most_bytes} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:  # the second: it is too long
        raise InvalidParameter(name, f"{host} could not be asked for the URL: {type(error).__name__}") from None
    return bytes(data)


def _parts(name: str, url: str, hosts: Sequence[str]) -> tuple[str, int, str]:
    """Host, port, and path with query of a URL that may be fetched."""
    try:
        parts = urlsplit(url)
        port = parts.port or 443
    except ValueError:
        raise InvalidParameter(name, "is no URL") from None
    host = (parts.hostname or "").lower()
    known = host if port == 443 else f"{host}:{port}"
    if parts.scheme.lower() != "https" or parts.username is not None or known not in hosts:
        raise InvalidParameter(name, f"no URL is fetched but https:// of {', '.join(hosts)}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidParameter(name, "the URL has characters that must be percent-encoded")
    return host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
