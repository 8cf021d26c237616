"""What the gangs say of themselves, as it reaches this process: routers write it, the gateway reads it.

Serve copies the module of a request router into the process that routes, so what a router shares with the gateway must
stand in another module than its own: here.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class GangRouter(Protocol):
    """A request router of one model; `service.routing.LeastBacklogRouter`."""

    @property
    def num_pending_requests(self) -> int:
        """Requests that wait in this process."""

    def gang_reports(self) -> Sequence[Mapping[str, Any]]:
        """The last report of each running gang: `workers.gang.gang.Gang.record_routing_stats`."""


_routers: "weakref.WeakValueDictionary[str, GangRouter]" = weakref.WeakValueDictionary()


def register(application: str, router: GangRouter) -> None:
    """Called by a router when it is made; the last one of an application counts."""
    _routers[application] = router


def lookup(application: str) -> tuple[int, Sequence[Mapping[str, Any]]]:
    """How many requests wait in this process for a Serve application, and what its gangs last said."""
    router = _routers.get(application)
    return (router.num_pending_requests, router.gang_reports()) if router else (0, ())
