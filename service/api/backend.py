"""What the API needs from the gateway, and how a route gets it.

`service.gateway.Gateway` is the backend in a deployment; tests use one without Ray.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager
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
        reason: why the ranks were lost.
        begun: whether they had begun with the request, which may be the cause.
    """

    attempt: int
    reason: str
    begun: bool = True


@dataclass(frozen=True)
class Waiting:
    """A request has made no progress for a while.

    Attributes:
        state: the state of its model.
        position: 1 for the request that is served next; 0: it does not wait for a gang, or its place is not known.
        wait_s: estimated seconds until its turn; 0: not known.
    """

    state: ModelState
    position: int = 0
    wait_s: float = 0.0


Report = StepEvent | Preview | Profiled | GenerationResult | Waiting | Restarted
"""A report of a request: steps, previews, profiles, its place while it waits, each restart, and the result last."""


@dataclass(frozen=True)
class Found:
    """The requests of all gateways that a caller may see.

    Attributes:
        requests: the `service.api.answers.RequestObject` of each.
        silent: gateways that have not answered in time; their requests are missing.
    """

    requests: list[dict[str, Any]] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


class JobRunner(Protocol):
    """Runs jobs: `service.jobs.runner.Runner`."""

    def wake(self) -> None:
        """Look for jobs at once, because one was submitted here."""

    def drop(self, job_id: str) -> None:
        """Stop a job that was cancelled or deleted here, if it runs here."""


class Backend(Protocol):
    """Runs requests and knows the models."""

    name: str
    instance_id: str
    max_body_bytes: int
    draining: bool
    local_only: bool
    cors_origins: Sequence[str]
    media_hosts: Sequence[str]
    public_url: str | None
    in_flight: int
    outputs: OutputStore
    idempotency: IdempotencyKeys
    jobs: Jobs
    webhooks: Webhooks
    runner: JobRunner

    def admit(self, authorization: str | None, admin: bool = False) -> None:
        """Raise `Unauthorized` or `AdminOnly` unless this `Authorization` header allows the call."""

    def caller(self) -> str:
        """The name of the API key that `admit` has found for this call; empty if none is needed."""

    def sees(self) -> str | None:
        """The name of the API key whose requests and jobs this call may see and end; None: all."""

    async def find_requests(self) -> Found:
        """The requests that wait or run in any gateway and that this caller may see."""

    async def cancel(self, request_id: str) -> bool:
        """End a request that this caller may see, in any gateway; False: no gateway has it."""

    def charge(self, request: GenerationRequest) -> AbstractContextManager[None]:
        """Charge the caller's key for this request as a job, if it is accepted inside the context; raise if the
        allowance is used up."""

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

    async def end(self) -> None:
        """End what goes on between requests, because the last one has been answered."""


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
