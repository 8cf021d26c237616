"""Traces: what one request did in the gateway, in its gang and on each rank, as spans for an OpenTelemetry collector.

The gateway decides once per request whether it is traced, and passes its place in the trace on as a W3C `traceparent`.
Ranks record their spans as plain data, which their gang exports together with its own. So ranks load no part of
OpenTelemetry, and the others load it only where a deployment names a collector: then `workers.otlp` sends in the
background, and drops what it cannot send.
"""

import asyncio
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from workers.otlp import Sender

HEADER = "traceparent"
"""Of W3C Trace Context, in REST; the metadata of gRPC has the same name."""

FORM = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)

Value = str | bool | int | float
Kind = Literal["server", "internal"]

LAST_S = 2.0
"""For the last spans of a process to be sent."""

OFF: Mapping[str, float | None] = {"otlp_endpoint": None, "sample_ratio": 1.0}
"""How an older version traced: not at all."""


@dataclass(frozen=True)
class Place:
    """A span's place: its trace, and itself in it.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16.
        sampled: whether the trace is recorded.
    """

    trace_id: str
    span_id: str
    sampled: bool = True

    @classmethod
    def parse(cls, header: str) -> Self | None:
        """What a `traceparent` says; None: it is none."""
        found = FORM.fullmatch(header)
        if found is None or (found[1] == "00" and found[5]):  # later versions may say more
            return None
        return cls(found[2], found[3], bool(int(found[4], 16) & 1))

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"

    def below(self) -> Self:
        """The place of a new span whose parent this is."""
        return replace(self, span_id=secrets.token_hex(8))


@dataclass(frozen=True)
class Event:
    """Something that happened within a span; `at` in seconds since the epoch."""

    name: str
    at: float
    attributes: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """One part of a request, with its begin and end in seconds since the epoch.

    Attributes:
        place: its own.
        parent_id: the span that it is a part of; empty: it is the whole trace.
        error: why it failed; empty: it has not.
    """

    place: Place
    parent_id: str
    name: str
    began_at: float
    ended_at: float
    attributes: Mapping[str, Value] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    error: str = ""
    kind: Kind = "internal"


class OpenSpan:
    """A span that has not ended, and those in it that have. Without a place it records nothing.

    Args:
        place: its own; None: the request is not traced.
        parent_id: as in `Span`.
        name: as in `Span`.
        kind: as in `Span`.
        attributes: as in `Span`; may be changed until it ends.
    """

    def __init__(
        self, place: Place | None, parent_id: str, name: str, attributes: Mapping[str, Value], kind: Kind = "internal"
    ) -> None:
        self.place = place
        self.attributes, self.error = dict(attributes), ""
        self._parent_id, self._name, self._kind = parent_id, name, kind
        self._events: list[Event] = []
        self._inner: list[Span] = []
        self._offset = time.time() - time.monotonic()  # so that a clock that is set meanwhile cannot turn a span around
        self.began_at = self.now()

    @property
    def traceparent(self) -> str:
        """For whoever works for this span; empty: the request is not traced."""
        return str(self.place) if self.place else ""

    def now(self) -> float:
        """Seconds since the epoch, by a clock that only goes forward."""
        return self._offset + time.monotonic()

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Something has happened now."""
        if self.place:
            self._events.append(Event(name, self.now(), attributes))

    def inner(self, name: str, began_at: float) -> None:
        """A part of it has ended now, which began at a time of `now`."""
        if self.place:
            self._inner.append(Span(self.place.below(), self.place.span_id, name, began_at, self.now()))

    def add(self, spans: Iterable[Span]) -> None:
        """Others have recorded these."""
        self._inner += spans

    def end(self) -> list[Span]:
        """It ends now: itself and all in it; nothing where it records nothing."""
        if self.place is None:
            return []
        own = Span(
            self.place,
            self._parent_id,
            self._name,
            self.began_at,
            self.now(),
            self.attributes,
            tuple(self._events),
            self.error,
            self._kind,
        )
        return [own, *self._inner]


@contextmanager
def spanning(
    parent: Place | None, name: str, attributes: Mapping[str, Value], on_spans: Callable[[Iterable[Span]], None]
) -> Iterator[OpenSpan]:
    """What happens inside, as a span; given to `on_spans` at its end, whatever the end.

    Args:
        parent: what it is a part of; None: it is not traced.
        name: of the span.
        attributes: of the span.
        on_spans: takes it, and all in it.
    """
    span = OpenSpan(parent and parent.below(), parent.span_id if parent else "", name, attributes)
    try:
        yield span
    except Exception as error:
        span.error = f"{type(error).__name__}: {error}"
        raise
    except BaseException:
        span.error = "canceled"
        raise
    finally:
        on_spans(span.end())


class Tracing:
    """The traces of one process. Nothing is traced before `follow`."""

    def __init__(self) -> None:
        self._endpoint: str | None = None
        self._ratio = 1.0
        self._sender: Sender | None = None

    def follow(self, otlp_endpoint: str | None, sample_ratio: float) -> None:
        """Trace so from now on; see `deploy.spec.Tracing`."""
        self._ratio = sample_ratio
        if otlp_endpoint == self._endpoint:
            return
        self._stop()
        self._endpoint = otlp_endpoint
        if otlp_endpoint is not None:
            from workers.otlp import Sender  # here: whoever does not trace does not load OpenTelemetry

            self._sender = Sender(otlp_endpoint)

    @property
    def on(self) -> bool:
        """Whether there is a collector."""
        return self._sender is not None

    def _stop(self) -> threading.Thread | None:
        """Trace no more; the thread sends what has come, which may take long."""
        before, self._sender, self._endpoint = self._sender, None, None
        if before is None:
            return None
        sending = threading.Thread(target=before.stop, daemon=True)
        sending.start()
        return sending

    def request(self, traceparent: str, name: str, attributes: Mapping[str, Value]) -> OpenSpan:
        """The first span of a request in this deployment. The caller's decision counts, else chance decides.

        Args:
            traceparent: what the caller has sent; anything else than a `traceparent` counts as nothing.
            name: of the span.
            attributes: of the span.
        """
        parent, place = Place.parse(traceparent), None
        if self._sender is not None and (parent.sampled if parent else random.random() < self._ratio):
            place = parent.below() if parent else Place(secrets.token_hex(16), secrets.token_hex(8))
        return OpenSpan(place, parent.span_id if parent else "", name, attributes, "server")

    def span(self, traceparent: str, name: str, attributes: Mapping[str, Value]) -> AbstractContextManager[OpenSpan]:
        """What happens inside, as a span of a request that the gateway traces; sent at its end.

        Args:
            traceparent: of its parent; empty: the request is not traced.
            name: of the span.
            attributes: of the span.
        """
        parent = Place.parse(traceparent) if self._sender is not None else None
        return spanning(parent, name, attributes, self.send)

    def send(self, spans: Iterable[Span]) -> None:
        """Send them in the background."""
        if self._sender is not None:
            self._sender.send(spans)

    async def close(self) -> None:
        """Trace no more, and let a collector have what has come: the process ends. One that is away gets `LAST_S`."""
        sending = self._stop()
        if sending is not None:
            await asyncio.to_thread(sending.join, LAST_S)
