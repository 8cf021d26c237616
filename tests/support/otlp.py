"""A collector of OpenTelemetry's protocol, over HTTP, that keeps what it is sent."""

import contextlib
import gzip
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue

PATIENCE_S = 120.0


@dataclass(frozen=True)
class Received:
    """One span; times in nanoseconds since the epoch."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: int
    began: int
    ended: int
    failed: bool
    said: str
    attributes: dict[str, Any]
    events: list[tuple[str, int, dict[str, Any]]]
    resource: dict[str, Any]


@dataclass
class Collector:
    """What has come.

    Attributes:
        url: for `tracing.otlp_endpoint`.
        spans: of all requests.
        answers: unset: whoever sends waits for an answer.
    """

    url: str = ""
    spans: list[Received] = field(default_factory=list)
    answers: threading.Event = field(default_factory=threading.Event)

    def trace(self, trace_id: str, count: int) -> list[Received]:
        """The spans of a trace, once there are so many."""
        deadline = time.monotonic() + PATIENCE_S
        while len(found := [span for span in self.spans if span.trace_id == trace_id]) < count:
            assert time.monotonic() < deadline, [span.name for span in found]
            time.sleep(0.05)
        return found


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """A collector at a free port of this machine."""
    kept = Collector()
    kept.answers.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            kept.answers.wait()
            if self.path == "/v1/traces":
                kept.spans += _spans(gzip.decompress(body) if self.headers.get("content-encoding") else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            with contextlib.suppress(OSError):  # the sender may have given up
                self.send_response(200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    kept.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield kept
    finally:
        kept.answers.set()
        server.shutdown()
        server.server_close()


def _spans(body: bytes) -> Iterator[Received]:
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        about = _attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Received(
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.name,
                    span.kind,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.status.code == 2,
                    span.status.message,
                    _attributes(span.attributes),
                    [(event.name, event.time_unix_nano, _attributes(event.attributes)) for event in span.events],
                    about,
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    def value(pair: KeyValue) -> Any:
        return getattr(pair.value, str(pair.value.WhichOneof("value")))

    return {pair.key: value(pair) for pair in pairs}
