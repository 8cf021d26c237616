"""What the gangs say of themselves, as it reaches this process: routers write it, the gateway reads it.

Serve copies the module of a request router into the process that routes, so what a router shares with the gateway must
stand in another module than its own: here.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Reporter(Protocol):
    """A request router of one model; `service.routing.LeastBacklogRouter`."""

    @property
    def num_pending_requests(self) -> int:
        """Requests that wait in this process."""

    def gang_reports(self) -> Sequence[Mapping[str, Any]]:
        """The last report of each running gang: `workers.gang.gang.Gang.record_routing_stats`."""


_reporters: "weakref.WeakValueDictionary[str, Reporter]" = weakref.WeakValueDictionary()


def publish(application: str, reporter: Reporter) -> None:
    """Called by a router when it is made; the last one of an application counts."""
    _reporters[application] = reporter


def of_application(application: str) -> tuple[int, Sequence[Mapping[str, Any]]]:
    """How many requests wait in this process for a Serve application, and what its gangs last said."""
    reporter = _reporters.get(application)
    return (reporter.num_pending_requests, reporter.gang_reports()) if reporter else (0, ())
