"""Preview files: the previews of requests as JPEGs, made in a thread of rank 0 while its ranks compute on.

Pixels come in, from `workers.gang.rank`, after the steps that have one; `Preview`s go out, after a later step or at the
end. Where they come faster than the thread encodes, the oldest are left out.
"""

import io
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from PIL import Image

from workers.messages import GenerationRequest, Preview
from workers.model.previews import Pixels

logger = logging.getLogger(__name__)

QUALITY = 75
"""Of the JPEGs. As PNGs they would take ten times as long, and twenty times the bytes."""

MOST_WAITING = 3
"""Previews that wait for the thread; as many as a request over REST has."""


class PreviewFiles:
    """Those of the requests of one rank, one request at a time."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None  # until some request has a preview
        self._coming: deque[Future[Preview]] = deque()
        self._request: GenerationRequest | None = None

    def begin(self, request: GenerationRequest) -> None:
        """Forget what is left of the request before, and take the previews of this one."""
        for each in self._coming:
            each.cancel()
        self._coming.clear()
        self._request = request

    def offer(self, index: int, step: int, pixels: Pixels) -> None:
        """Take a preview.

        Args:
            index: its number in the request.
            step: after which it was made.
            pixels: what it shows.
        """
        assert self._request is not None
        self._thread = self._thread or ThreadPoolExecutor(1, "previews")
        waiting = [each for each in self._coming if not each.done() and not each.running()]
        if len(waiting) >= MOST_WAITING and waiting[0].cancel():
            self._coming.remove(waiting[0])
        self._coming.append(self._thread.submit(_encoded, index, step, pixels, self._request))

    def finished(self, wait: bool = False) -> Iterator[Preview]:
        """The previews that are encoded, in order, each once.

        Args:
            wait: for all that were offered. They take milliseconds, and decoding has passed in between.
        """
        while self._coming and (wait or self._coming[0].done()):
            try:
                yield self._coming.popleft().result()
            except Exception:  # the library raises anything; the picture itself is not affected
                logger.exception("a preview cannot be encoded")


def _encoded(index: int, step: int, pixels: Pixels, request: GenerationRequest) -> Preview:
    """A JPEG of the shape of the request, as large as it, but for the limit of its options."""
    assert request.previews is not None
    picture = Image.fromarray(pixels.numpy()) if isinstance(pixels, torch.Tensor) else pixels
    scale = min(1.0, request.previews.max_edge / max(request.width, request.height))
    size = max(1, round(request.width * scale)), max(1, round(request.height * scale))
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(buffer, format="jpeg", quality=QUALITY)
    return Preview(index, step, buffer.getvalue())
