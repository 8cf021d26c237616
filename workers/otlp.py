"""Sends spans to an OpenTelemetry collector, by OTLP over HTTP. For `workers.tracing`, where a deployment has one.

A thread of OpenTelemetry's sends what has come, once a second. It waits for a collector that does not answer; whoever
gives spans never does. Of those that wait, the oldest are dropped. Headers, certificates and the like are read from
OpenTelemetry's own environment variables.
"""

import logging
import os
import socket
import threading
from collections.abc import Iterable
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from workers.tracing import Place, Span

PATH = "/v1/traces"
"""Of every collector."""

MOST_WAITING = 8192
"""Spans."""

PERIOD_MS = 1000

PATIENCE_S = 10.0
"""With one batch, retries included."""

MOST_EVENTS = 4096
"""Of a span: steps of a request."""

KINDS = {"server": SpanKind.SERVER, "internal": SpanKind.INTERNAL}


class _Given(IdGenerator):
    """Ids that were drawn before: a span's children have known its id since it began."""

    def __init__(self) -> None:
        self.place = Place("0" * 32, "0" * 16)

    def generate_span_id(self) -> int:
        return int(self.place.span_id, 16)

    def generate_trace_id(self) -> int:
        return int(self.place.trace_id, 16)


class Sender:
    """Sends the spans of one process.

    Args:
        endpoint: the collector's URL, to which `PATH` is added.
    """

    def __init__(self, endpoint: str) -> None:
        about: dict[str, str | int] = {"service.name": "spray", "service.version": version("spray")}
        about |= {"host.name": socket.gethostname(), "process.pid": os.getpid()}
        logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)  # not each retry, but what is lost
        self._ids, self._lock = _Given(), threading.Lock()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create(about),
            shutdown_on_exit=False,  # else a collector that is down would hold up the end of this process
            id_generator=self._ids,
            span_limits=SpanLimits(max_events=MOST_EVENTS),
        )
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}{PATH}", timeout=PATIENCE_S)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=MOST_WAITING, schedule_delay_millis=PERIOD_MS)
        )
        self._tracer = self._provider.get_tracer("spray")

    def send(self, spans: Iterable[Span]) -> None:
        """Take spans over. Returns at once."""
        with self._lock:
            for span in spans:
                self._send(span)

    def stop(self) -> None:
        """Send what has come, then no more. May take long."""
        self._provider.shutdown()

    def _send(self, span: Span) -> None:
        self._ids.place, within = span.place, Context()  # not the one of this task, in which Serve may trace
        if span.parent_id:
            parent = SpanContext(
                int(span.place.trace_id, 16), int(span.parent_id, 16), is_remote=True, trace_flags=TraceFlags(1)
            )
            within = set_span_in_context(NonRecordingSpan(parent), within)
        sent = self._tracer.start_span(
            span.name,
            context=within,
            kind=KINDS[span.kind],
            attributes=span.attributes,
            start_time=_ns(span.began_at),
        )
        for event in span.events:
            sent.add_event(event.name, event.attributes, _ns(event.at))
        if span.error:
            sent.set_status(Status(StatusCode.ERROR, span.error))
        sent.end(_ns(span.ended_at))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
