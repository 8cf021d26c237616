"""Encoding: the pictures that rank 0 has decoded, until they are files.

`workers.gang.rank` keeps them here when a request has left the ranks, and encodes them in a thread of its own while the
next request computes. `workers.gang.answers` sees to it that few wait.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deploy.model_spec import ModelSpec
from workers.errors import OutOfMemory, RequestFailed
from workers.messages import Drawn, GenerationRequest, GenerationResult
from workers.model.media import encode
from workers.model.out_of_memory import advice, is_out_of_memory


class Encoding:
    """Pictures by request. Two threads use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[GenerationRequest, Sequence[Any], GenerationResult]] = {}

    def keep(self, request: GenerationRequest, pictures: Sequence[Any], took: GenerationResult) -> Drawn:
        """Keep the pictures, or lists of frames, of a request until `encode` is called for it.

        Args:
            request: what was asked for.
            pictures: what was drawn.
            took: the result, still without outputs.
        """
        with self._lock:
            self._waiting[request.request_id] = request, pictures, took
        return Drawn(request.request_id, took)

    def encode(self, request_id: str, model: ModelSpec) -> GenerationResult:
        """Encode the pictures of a request, and forget them whatever happens.

        Args:
            request_id: of the request.
            model: what drew it.

        Raises:
            RequestFailed: they cannot be encoded.
            OutOfMemory: ... for lack of memory.
        """
        with self._lock:
            request, pictures, took = self._waiting.pop(request_id)
        before = time.perf_counter()
        try:
            outputs = tuple(encode(made, request, number) for number, made in enumerate(pictures))
        except Exception as error:  # the libraries raise anything; no rank takes part in it, so none is lost
            if is_out_of_memory(error):
                raise OutOfMemory(advice(model, request, None), True) from error
            raise RequestFailed(f"encoding failed: {type(error).__name__}: {error}") from error
        return replace(took, outputs=outputs, encode_media_seconds=time.perf_counter() - before)
