"""Pictures of a finished video, made on request by `variant`. For `service.api.video_jobs`.

A few threads make them, since decoding takes a processor; further requests wait.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from fastapi import Request
from fastapi.responses import Response

from service.api.outputs import KINDS, has
from service.state.stored import Stored
from workers.model.stills import spritesheet, thumbnail

Still = Literal["thumbnail", "spritesheet"]

MAKERS = {"thumbnail": (thumbnail, "webp"), "spritesheet": (spritesheet, "jpeg")}
"""The function for each variant, with the kind of file that it makes."""

_threads = ThreadPoolExecutor(2, thread_name_prefix="stills")


async def send_still(http: Request, video: Stored, still: Still, name: str) -> Response:
    """A picture of a video.

    Args:
        http: the request, with its conditions.
        video: the video, from the store of outputs.
        still: the variant.
        name: the name of the file, without its suffix.
    """
    make, kind = MAKERS[still]
    headers = {
        "etag": (etag := f'"{video.name}-{still}"'),
        "cache-control": "private, immutable",
        "content-disposition": f'attachment; filename="{name}-{still}.{kind}"',
        "x-content-type-options": "nosniff",
    }
    if has(http, etag):
        return Response(status_code=304, headers=headers)

    def made() -> bytes:
        with video.open() as opened:
            return make(opened)

    content = await asyncio.get_running_loop().run_in_executor(_threads, made)
    return Response(content, headers=headers, media_type=KINDS[kind])
