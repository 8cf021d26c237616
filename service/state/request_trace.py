"""The trace of one request, as its gateway sees it: the span `request`, and inside it `queue` and `encode_media`.

Called by `service.gateway`. The request carries the `traceparent` to its gang, which adds its own spans; see
`workers.tracing`.
"""

from workers.messages import GenerationRequest, GenerationResult
from workers.tracing import Tracing, Value


class RequestTrace:
    """The spans of one request, from its admission to its end. Records nothing if it is not traced.

    Args:
        tracing: the tracing of this gateway.
        request: what is asked for.
        traceparent: the caller's; empty: it has sent none.
        key: the name of the caller's API key; empty: none is needed.

    Attributes:
        has_begun: some gang has had it.
    """

    def __init__(self, tracing: Tracing, request: GenerationRequest, traceparent: str, key: str) -> None:
        asked: dict[str, Value] = {
            "spray.request_id": request.request_id,
            "spray.model": request.model,
            "spray.key": key,
            "spray.width": request.width,
            "spray.height": request.height,
            "spray.num_frames": request.num_frames,
            "spray.n": request.n,
            "spray.steps": request.num_inference_steps,
        }
        self._tracing = tracing
        self._span = tracing.request(traceparent, "request", asked)
        self._queued_at: float | None = None
        self.has_begun = False

    @property
    def traceparent(self) -> str:
        """The `traceparent` for the gang and for the caller; empty: the request is not traced."""
        return self._span.traceparent

    @property
    def trace_id(self) -> str:
        """The id of the trace, for the log; empty: the request is not traced."""
        return self._span.place.trace_id if self._span.place else ""

    def waits(self) -> None:
        """Note that it waits for a gang."""
        self._queued_at = self._span.now()

    def begun(self) -> None:
        """Note that a gang has it."""
        self.has_begun = True
        self._end_queue()

    def _end_queue(self) -> None:
        if self._queued_at is not None:
            self._span.inner("queue", self._queued_at)
        self._queued_at = None

    def lost(self, reason: str) -> None:
        """Note that its gang is lost, and that it waits again."""
        self._span.event("lost", {"reason": reason})

    def ended(self, outcome: str, attempts: int, result: GenerationResult | None) -> None:
        """Note that it has ended, for whatever reason, and send what was recorded."""
        self._end_queue()  # where it has ended in the queue
        self._span.attributes |= {"spray.outcome": outcome, "spray.attempts": attempts}
        if result is None:
            self._span.error = outcome
        else:
            self._span.inner("encode_media", self._span.now() - result.encode_media_seconds)
        self._tracing.send(self._span.end())
