"""Finished files: `GET /v1/outputs/{name}`, to which the URLs of answers lead. Their signature is the key.

Files never change, so their name is their ETag. A request for one range of bytes gets it; any other gets the whole
file.
"""

import asyncio
import re
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from service.api.backend import Served
from service.api.openapi import BYTES, READING_ERRORS
from service.state.stored import Stored

router = APIRouter(prefix="/outputs")

CHUNK = 1 << 20
RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")

KINDS = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
    "zip": "application/zip",
}
"""Content types by suffix."""

FILE = {kind: {"schema": BYTES} for kind in KINDS.values()}


@router.head("/{name}", include_in_schema=False)
@router.get(
    "/{name}",
    response_class=Response,
    responses=READING_ERRORS
    | {
        200: {"description": "the file", "content": FILE},
        206: {"description": "a range of its bytes", "content": FILE},
        304: {"description": "the caller has it"},
        416: READING_ERRORS[404] | {"description": "range_not_satisfiable"},
    },
)
async def retrieve_output(
    http: Request, backend: Served, name: str, expires: str = "", signature: str = ""
) -> Response:
    """A picture, a video or a zip of pictures, until its URL expires."""
    file = await asyncio.to_thread(backend.outputs.find, name, expires, signature)
    return send_file(http, file, f'inline; filename="{name}"')


def send_file(http: Request, file: Stored, disposition: str) -> Response:
    """A file, or the range of it that the request asks for.

    Args:
        http: the request, with its conditions.
        file: a file of the store of outputs.
        disposition: the header `content-disposition`.

    Raises:
        HTTPException: 416, the file does not have the range.
    """
    size, etag = file.size, f'"{file.name}"'
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "cache-control": "private, immutable",
        "content-disposition": disposition,
        "x-content-type-options": "nosniff",
    }
    if has(http, etag):
        return Response(status_code=304, headers=headers)
    first, end = _range(http, etag, size)
    status = 200 if (first, end) == (0, size) else 206
    if status == 206:
        headers["content-range"] = f"bytes {first}-{end - 1}/{size}"
    headers["content-length"] = str(end - first)
    kind = KINDS[file.kind]
    if http.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=kind)
    return StreamingResponse(_chunks(file, first, end), status_code=status, headers=headers, media_type=kind)


def has(http: Request, etag: str) -> bool:
    """Whether the caller has the file: by its tag, which compressing proxies make a weak one, or by `*`."""
    tags = [tag.strip().removeprefix("W/") for line in http.headers.getlist("if-none-match") for tag in line.split(",")]
    return etag in tags or tags == ["*"]


def _range(http: Request, etag: str, size: int) -> tuple[int, int]:
    """The requested range: its first byte, and the one after its last."""
    asked = RANGE.fullmatch(http.headers.get("range", "").replace(" ", ""))
    if asked is None or asked[0] == "bytes=-" or http.headers.get("if-range", etag) != etag:
        return 0, size
    if not asked[1]:  # the last so many
        first, end = max(0, size - int(asked[2])), size
    else:
        first, end = int(asked[1]), min(size, int(asked[2] or size) + 1)
        if asked[2] and int(asked[2]) < first:
            return 0, size
    if first >= end:
        raise HTTPException(416, f"the file has {size} bytes", {"content-range": f"bytes */{size}"})
    return first, end


async def _chunks(file: Stored, first: int, end: int) -> AsyncGenerator[bytes]:
    opened = await asyncio.to_thread(file.open)
    try:
        await asyncio.to_thread(opened.seek, first)
        while first < end:
            chunk = await asyncio.to_thread(opened.read, min(CHUNK, end - first))
            if not chunk:
                return
            first += len(chunk)
            yield chunk
    finally:
        opened.close()
