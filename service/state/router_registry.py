"""The request routers of this process, through which the gateway reads its queues and the gangs' reports.

Serve copies the module of a request router into the process that routes, so whatever a router shares with the gateway
must live in another module: here.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from service.state.tickets import Prospect, Takes
from service.state.waiting import waiting_for
from workers.messages import GenerationRequest


class GangRouter(Protocol):
    """The request router of one model: `service.routing.LeastBacklogRouter`."""

    def gang_reports(self) -> Sequence[Mapping[str, Any]]:
        """The last report of each running gang: `workers.gang.gang.Gang.record_routing_stats`."""

    def takes(self, request: GenerationRequest) -> Takes:
        """The seconds that a request would take on one of its gangs."""

    async def prospect(self, caller: str) -> Prospect:
        """What a new request of this caller would wait for."""

    async def standing(self, request_id: str) -> Prospect | None:
        """What a waiting request still waits for; None if it does not wait."""

    def lose(self, request_id: str) -> None:
        """Note that the gang which ran this request has lost its ranks."""


_routers: "weakref.WeakValueDictionary[str, GangRouter]" = weakref.WeakValueDictionary()


def register(application: str, router: GangRouter) -> None:
    """Add the router of an application; called by the router itself. The last one counts."""
    _routers[application] = router


def lookup(application: str) -> tuple[int, Sequence[Mapping[str, Any]]]:
    """How many requests wait in this process for an application, and the last reports of its gangs."""
    router = _routers.get(application)
    return len(waiting_for(application)), router.gang_reports() if router else ()


def takes(application: str, request: GenerationRequest) -> Takes:
    """The seconds that a request would take on a gang; not known before the first request to the application."""
    router = _routers.get(application)
    return router.takes(request) if router else Takes(0.0, 0.0)


async def prospect(application: str, caller: str) -> Prospect:
    """What a new request of this caller would wait for; nothing before the first request to the application."""
    router = _routers.get(application)
    return await router.prospect(caller) if router else Prospect(0, 0.0)


async def standing(application: str, request_id: str) -> Prospect | None:
    """What a waiting request still waits for; None if it does not wait."""
    router = _routers.get(application)
    return await router.standing(request_id) if router else None


def lose(application: str, request_id: str) -> None:
    """Tell the router that the gang which ran this request has lost its ranks: its own report comes a second later."""
    router = _routers.get(application)
    if router:
        router.lose(request_id)
