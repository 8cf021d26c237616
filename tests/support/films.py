"""A backend without Ray whose videos are real MP4s, for clients that look at what they get."""

from collections.abc import AsyncGenerator
from dataclasses import replace

from PIL import Image

from service.api.backend import Report
from tests.support.backend import FakeBackend
from workers.messages import GenerationRequest, GenerationResult
from workers.model.media import encode


def film(request: GenerationRequest) -> bytes:
    """The MP4 that is made for a request: frames of one color, which its seed decides."""
    color = ((request.seed or 0) * 40 % 256, 120, 60)
    return encode([Image.new("RGB", (request.width, request.height), color)] * request.num_frames, request)


class Films(FakeBackend):
    """Answers as `FakeBackend` does, but videos are MP4s."""

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        async for report in super()._generate(request):
            if isinstance(report, GenerationResult) and request.output_format == "mp4":
                report = replace(report, outputs=(film(request),))
            yield report
