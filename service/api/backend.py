"""What the API needs of the gateway, and how a route gets at it.

`service.gateway.Gateway` is the backend in a deployment; tests use one without Ray.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from deploy.model_spec import ModelSpec
from service.api.origin import reject_foreign_hosts, reject_foreign_pages
from service.jobs.records import Priority
from service.jobs.store_actor import Jobs
from service.jobs.webhooks import Webhooks
from service.state.idempotency import IdempotencyKeys
from service.state.model_states import ModelState
from service.state.outputs import OutputStore
from workers.errors import GangLost
from workers.messages import GenerationRequest, GenerationResult, Preview, Profiled, StepEvent


@dataclass(frozen=True)
class Restarted:
    """A request lost its ranks and starts again on others: steps count from 1, the seed stays.

    Attributes:
        attempt: 2 for the first restart.
        reason: what became of the ranks.
        begun: they had begun with the request, which may be the cause.
    """

    attempt: int
    reason: str
    begun: bool = True


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


Report = StepEvent | Preview | Profiled | GenerationResult | Waiting | Restarted
"""What a request yields: steps, previews and profiles, its place while it waits, each restart, and the result last."""


@dataclass(frozen=True)
class Found:
    """The requests of all gateways that a caller may see.

    Attributes:
        requests: `service.api.answers.RequestObject` of each.
        silent: gateways that have not answered in time, whose requests are missing.
    """

    requests: list[dict[str, Any]] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


class JobRunner(Protocol):
    """Runs jobs: `service.jobs.runner.Runner`."""

    def wake(self) -> None:
        """A job was submitted here: look at once."""

    def drop(self, job_id: str) -> None:
        """A job was cancelled or deleted here: stop it at once, if it runs here."""

    async def stop(self) -> None:
        """The gateway ends: other ones take over its jobs."""


class Backend(Protocol):
    """Runs requests and knows the models."""

    name: str
    instance_id: str
    max_body_bytes: int
    draining: bool
    local_only: bool
    cors_origins: Sequence[str]
    media_hosts: Sequence[str]
    in_flight: int
    outputs: OutputStore
    idempotency: IdempotencyKeys
    jobs: Jobs
    webhooks: Webhooks
    runner: JobRunner

    def admit(self, authorization: str | None, admin: bool = False) -> None:
        """Raise `Unauthorized` or `AdminOnly` unless this `Authorization` header allows the call."""

    def caller(self) -> str:
        """The name of the API key that `admit` has found for this call; empty: none is needed."""

    def sees(self) -> str | None:
        """The name of the API key whose requests and jobs this call may see and end; None: all."""

    async def find_requests(self) -> Found:
        """What waits and runs in any gateway, as far as this caller may see it."""

    async def cancel(self, request_id: str) -> bool:
        """End a request that this caller may see, in whatever gateway it is; False: none has it."""

    def charge(self, request: GenerationRequest) -> None:
        """Raise unless the caller's key may have this request as a job; it counts as used then."""

    async def check_job(self, request: GenerationRequest, priority: Priority, deadline_s: float | None) -> None:
        """Raise unless the caller may have this request as a job that ends in time, as far as is known."""

    def models(self) -> dict[str, ModelSpec]:
        """The models of the deployment by name."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        """Run one request. While it waits, its place is yielded every few seconds."""

    def states(self) -> dict[str, ModelState]:
        """The state of each model by name."""

    def cluster(self) -> dict[str, Any]:
        """The body of `GET /v1/cluster`."""


async def get_backend(http: Request) -> Backend:
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


async def result_of(reports: AsyncGenerator[Report]) -> GenerationResult:
    """Run one request to its end and return the result.

    Raises:
        GangLost: the backend yielded no result.
    """
    last = None
    async for report in reports:  # to the end: leaving early means canceling
        last = report
    if not isinstance(last, GenerationResult):
        raise GangLost("the ranks ended without a result")
    return last
