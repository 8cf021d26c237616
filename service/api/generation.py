"""One generation, from its body to its answer: JSON, a file, or a stream. For the routers of pictures and videos.

Finished files leave in base64, as they are, or by a URL; the bytes are the same.
"""

import asyncio
import base64
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import TypeAdapter

from service.api.backend import Backend, result_of
from service.api.bodies import GenerationBody, ResponseFormat, VideoGenerationBody
from service.api.made import made_size
from service.api.once import KEY_HEADER, begin
from service.api.origin import deadline, request_id
from service.api.outputs import KINDS
from service.api.pictures import read_pictures
from service.api.responses import generation_response, ignored_header, metrics, warnings_header
from service.api.schemas import find_model, media_of, most_frames, to_request
from service.api.streaming import EventStream
from service.state.outputs import OutputStore
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest, GenerationResult

_ANSWER = TypeAdapter(dict[str, Any])


class Delivery:
    """How the files of one request reach its caller.

    Args:
        form: base64 or URLs.
        outputs: keeps the files of URLs.
        owner: of these files.
        base: the beginning of each URL.
    """

    def __init__(self, form: ResponseFormat, outputs: OutputStore, owner: str, base: str) -> None:
        self._form, self._outputs, self._owner, self._base = form, outputs, owner, base

    async def __call__(self, request: GenerationRequest, result: GenerationResult) -> dict[str, Any]:
        """The body of an answer with these files."""
        data = [
            await self._deliver(output, request.output_format) | {"seed": seed}
            for output, seed in zip(result.outputs, result.seeds, strict=True)
        ]
        return generation_response(request, result, data)

    async def _deliver(self, output: bytes, kind: str) -> dict[str, Any]:
        if self._form == "url":
            link = await asyncio.to_thread(self._outputs.keep_once, self._owner, output, kind)
            return {"url": self._base + link.path, "expires_at": link.expires}
        return {"b64_json": base64.b64encode(output).decode()}


async def settled(http: Request, backend: Backend, body: GenerationBody) -> GenerationRequest:
    """The request of a body, with its pictures decoded.

    Raises:
        InvalidParameter: it is wrong.
        QueueFull: too many pictures are being decoded.
    """
    model = find_model(backend.models(), body.model)
    files = media_of(body, model)
    try:
        inputs = await read_pictures(files, most_frames(body, model)) if files else ()
    except InvalidParameter as error:
        if error.param == "image" and isinstance(body, VideoGenerationBody) and body.input_reference is not None:
            error.param = "input_reference"  # the name that the caller has used
        raise
    return to_request(body, model, request_id(http), inputs)


async def respond(http: Request, backend: Backend, body: GenerationBody, default: ResponseFormat) -> Response:
    """Run the request of a body, and answer in the form that the body asks for.

    Args:
        http: the HTTP request.
        backend: runs the request.
        body: what is asked for.
        default: the default `response_format` of an answer without a stream.

    Raises:
        Exception: what the backend raises.
    """
    form = body.response_format or ("b64_json" if body.stream else default)
    if body.stream and form == "file":
        raise InvalidParameter("response_format", "response_format 'file' is not for streams; ask for b64_json or url")
    request = replace(await settled(http, backend, body), deadline_at=deadline(http))
    headers = ignored_header(body.ignored)
    base = backend.public_url or f"{http.url.scheme}://{http.url.netloc}"
    deliver = Delivery(form, backend.outputs, backend.caller(), base)
    if form == "url":
        await asyncio.to_thread(backend.outputs.prepare)
    attempt = await begin(backend, request, http.headers.get(KEY_HEADER))
    headers |= attempt.headers
    if body.stream:
        include_progress = body.stream_options.include_progress
        return await EventStream.open(attempt.reports, request, include_progress, headers, deliver)
    result = await result_of(attempt.reports)
    headers |= warnings_header(result)
    if form == "file":
        return _file(request, result, headers)
    # Eight times as fast as json: pictures are long strings, and all requests of a gateway wait meanwhile.
    content = _ANSWER.dump_json(await deliver(request, result))
    return Response(content, media_type="application/json", headers=headers)


def _file(request: GenerationRequest, result: GenerationResult, headers: Mapping[str, str]) -> Response:
    """The file itself, or a zip of several; headers have the rest of the answer."""
    kind, content = str(request.output_format), result.outputs[0]
    if len(result.outputs) > 1:
        kind, content = "zip", _zip(result, kind)
    said = {
        "x-seed": ", ".join(map(str, result.seeds)),
        "x-metrics": json.dumps(metrics(result)),
        "content-disposition": f'attachment; filename="{request.model}-{result.seeds[0]}.{kind}"',
    }
    if kind == "mp4":
        made = made_size(request.width, request.height, request.num_frames, result.warnings)
        said |= {"x-num-frames": str(made.num_frames), "x-fps": str(request.fps)}
    return Response(content, media_type=KINDS[kind], headers=said | dict(headers))


def _zip(result: GenerationResult, kind: str) -> bytes:
    """A zip with a file per picture, named by its number and seed, without compression, since pictures are compressed.

    Files have no time, so that the same pictures give the same bytes.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, (output, seed) in enumerate(zip(result.outputs, result.seeds, strict=True)):
            archive.writestr(zipfile.ZipInfo(f"{number}-{seed}.{kind}"), output)
    return buffer.getvalue()
