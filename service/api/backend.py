"""What the API needs of the gateway, and how a route gets at it.

`service.gateway.Gateway` is the backend in a deployment; tests use one without Ray.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from deploy.spec import ModelSpec
from service.api.origin import reject_foreign_hosts, reject_foreign_pages
from service.state.model_states import ModelState
from service.state.outputs import OutputStore
from workers.errors import GangLost
from workers.messages import GenerationRequest, GenerationResult, StepEvent


@dataclass(frozen=True)
class Restarted:
    """A request lost its ranks and starts again on others: steps count from 1, the seed stays.

    Attributes:
        attempt: 2 for the first restart.
        reason: what became of the ranks.
    """

    attempt: int
    reason: str


@dataclass(frozen=True)
class Waiting:
    """A request has had nothing to say for a while.

    Attributes:
        state: of its model.
        position: 1 for the one that is served next; 0: it does not wait for a gang, or nobody knows.
        wait_s: estimated seconds until its turn; 0: unknown.
    """

    state: ModelState
    position: int = 0
    wait_s: float = 0.0


Report = StepEvent | GenerationResult | Waiting | Restarted
"""What a request yields: steps, its place while it waits, each restart, and the result last."""


class Backend(Protocol):
    """Runs requests and knows the models."""

    name: str
    instance_id: str
    max_body_bytes: int
    draining: bool
    local_only: bool
    cors_origins: Sequence[str]
    in_flight: int
    outputs: OutputStore

    def admit(self, authorization: str | None, admin: bool = False) -> None:
        """Raise `Unauthorized` or `AdminOnly` unless this `Authorization` header allows the call."""

    def models(self) -> dict[str, ModelSpec]:
        """The models of the deployment by name."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        """Run one request. While it waits, its place is yielded every few seconds."""

    def states(self) -> dict[str, ModelState]:
        """The state of each model by name."""

    def cluster(self) -> dict[str, Any]:
        """The body of `GET /v1/cluster`."""


def get_backend(http: Request) -> Backend:
    """The backend that `service.api.rest.rest_app` was given."""
    backend: Backend = http.app.state.backend
    return backend


Served = Annotated[Backend, Depends(get_backend)]
"""The type of a route's parameter that receives the backend."""


async def require_key(http: Request, backend: Served) -> None:
    """Reject callers without a valid API key, and foreign web pages, before their body is read; on every /v1 route."""
    backend.admit(http.headers.get("authorization"))
    reject_foreign_pages(http, backend.local_only, backend.cors_origins)


async def require_own_host(http: Request, backend: Served) -> None:
    """Reject calls of a loopback server by another name; on every route that needs no key and is no probe."""
    reject_foreign_hosts(http, backend.local_only)


async def run(backend: Backend, request: GenerationRequest) -> GenerationResult:
    """Run one request to its end and return the result.

    Raises:
        GangLost: the backend yielded no result.
    """
    reports = [report async for report in backend.generate(request)]  # to the end: leaving early means cancelling
    if not reports or not isinstance(reports[-1], GenerationResult):
        raise GangLost("the ranks ended without a result")
    return reports[-1]
