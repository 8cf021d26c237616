"""The gateway: a Serve deployment that knows the models and admits requests to them. The API's backend.

Its table of models comes as `user_config`, so that it changes without a restart. Who may call is `service.access`'s;
`service.dispatch` sends each request to a gang.
"""

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import RayServeException

from deploy.model_spec import ModelSpec
from deploy.spec import SpecError
from deploy.storage_spec import Idempotency, Outputs
from service.access import Access
from service.api.backend import Found, Report, Restarted
from service.api.errors import STATUS, UNEXPECTED, find_status
from service.api.observed import callers_trace, current_call
from service.api.rest import rest_app
from service.deadline import check_deadline
from service.dispatch import Dispatcher
from service.jobs.backlog import JobBacklog
from service.jobs.lost_runners import LostRunners
from service.jobs.records import Priority
from service.jobs.runner import Runner
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.jobs.webhooks import Webhooks
from service.names import app_name
from service.rpc.methods import GrpcMethods
from service.state import router_registry, shared_turns
from service.state.exchange import Colleagues, Question
from service.state.idempotency import IdempotencyKeys
from service.state.live_requests import LiveRequests
from service.state.model_states import ModelState
from service.state.outputs import OutputStore
from service.state.poller import Poller
from service.state.prefetch import Prefetch
from service.state.request_log import RequestLog
from service.state.request_trace import RequestTrace
from workers.errors import (
    AdminOnly,
    Forbidden,
    GatewaySilent,
    IdempotencyKeyReused,
    JobNotFound,
    JobNotReady,
    JobsUnavailable,
    KeysUnavailable,
    OutputsFull,
    OutputsUnavailable,
    RequestNotFound,
    ShuttingDown,
    Unauthorized,
    UnsupportedMediaType,
)
from workers.exporter import Exporter, share_values
from workers.gang.elastic import slots
from workers.gang.ray_internals import keep_replica_on_node_ip
from workers.messages import GenerationRequest, GenerationResult
from workers.observing import GatewayMetrics
from workers.tracing import HEADER, OFF, Tracing

logger = logging.getLogger("ray.serve")

OK, CANCELLED = "ok", "cancelled"
NOT_ADMITTED = (
    *(
        Unauthorized,
        Forbidden,
        AdminOnly,
        UnsupportedMediaType,
        JobNotFound,
        JobNotReady,
        JobsUnavailable,
        OutputsFull,
        OutputsUnavailable,
    ),
    *(RequestNotFound, GatewaySilent, IdempotencyKeyReused, KeysUnavailable),
)
OUTCOMES = {OK, UNEXPECTED.code, *(status.code for error, status in STATUS.items() if error not in NOT_ADMITTED)}
"""How an admitted request can end, for metrics. CANCELLED is among the errors' codes."""

NO_LOG = {"log_format": "text", "prompts": False}
"""How an older version told of requests: it did not."""

NO_JOBS = {"folder": None, "url_env": None}
"""Where an older version keeps jobs: it has none."""


class Gateway(GrpcMethods):
    """One replica of the gateway. It answers REST by the application that it builds, and gRPC by inherited methods.

    Args:
        instance_id: tells this deployment from another that may answer on the same port.
    """

    def __init__(self, instance_id: str) -> None:
        keep_replica_on_node_ip()
        self.name = _own_name().rpartition("#")[2]
        self.instance_id = instance_id
        self.max_body_bytes = 1 << 20
        self.draining = False
        self.local_only = False
        self.cors_origins: Sequence[str] = ()
        self.media_hosts: Sequence[str] = ()
        self.public_url: str | None = None
        self.in_flight = 0
        self.outputs = OutputStore()
        self.idempotency = IdempotencyKeys(_own_name())
        self._live = LiveRequests(_short_name())
        self._colleagues = Colleagues(_short_name(), self._answer, shared_turns.start_keeper)
        self.jobs = Jobs()
        self.webhooks = Webhooks(self.jobs)
        self._backlog = JobBacklog(lambda: {name: state.gangs for name, state in self.states().items()})
        known = self._run_for, self._room, self.models, self._backlog, LostRunners(_own_name())
        self.runner = Runner(self.jobs, self.outputs, _own_name(), *known)
        self._access = Access(_short_name())
        self._models: dict[str, ModelSpec] = {}
        self._dispatcher = Dispatcher(
            _own_name(), lambda: self.states(), self._live, lambda model: self._metrics_of(model).lost()
        )
        self._poller = Poller(self._backlog.share, self._dispatcher.greet)
        self._prefetch = Prefetch()
        self._exporter = Exporter(share_values())
        self._metrics: dict[str, GatewayMetrics] = {}
        self._log = RequestLog()
        self._tracing = Tracing()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve at start and whenever the model table changes; see `service.app.gateway_application`.

        Raises:
            RuntimeError: keys are asked for that cannot be read, and there are none from before: nobody may call. Serve
                then fails the rollout. At start also: the variable for jobs or webhooks holds nothing.
        """
        starting = not self._access.configured
        try:  # before all else: what follows may fail, or let more callers in
            self._access.configure(user_config["api_keys_env"], user_config.get("api_keys_file"))
        except SpecError as error:
            self._complain(error, fatal=not self._access.configured)
        specs = [ModelSpec.model_validate(model) for model in user_config["models"]]
        self._models = {spec.name: spec for spec in specs}
        self.draining = user_config["draining"]
        self.local_only = user_config.get("local_only", False)  # a running older version deployed none
        self.cors_origins = tuple(user_config.get("cors_origins", ()))  # likewise
        self.media_hosts = tuple(user_config.get("media_hosts", ()))  # likewise
        self.public_url = user_config.get("public_url")  # likewise
        self._log.follow(**user_config.get("log", NO_LOG))  # likewise
        self._tracing.follow(**user_config.get("tracing", OFF))  # likewise
        self._backlog.gateways = user_config.get("gateways", 1)
        several = self._backlog.gateways > 1
        shared_turns.share(several)
        self._colleagues.follow(several and ray.is_initialized())
        self._access.share(several and ray.is_initialized())
        self.max_body_bytes = user_config["max_body_bytes"]
        outputs = user_config.get("outputs", Outputs().model_dump())  # an older version deployed none
        try:
            self.jobs.follow(**user_config.get("jobs", NO_JOBS), keep_s=outputs["ttl_s"])
        except SpecError as error:
            self._complain(error, fatal=starting)
        try:
            self.webhooks.follow(user_config.get("webhook_hosts", ()), user_config.get("webhook_key_env"))  # likewise
        except SpecError as error:
            self._complain(error, fatal=starting)
        self._poller.follow(self._models)
        self._dispatcher.follow(self._models)
        self.outputs.follow(**outputs)
        self.runner.follow()
        self.idempotency.follow(user_config.get("idempotency", Idempotency().model_dump()))
        self._prefetch.follow(specs, user_config["models_folder"])
        for name in {*self._models, *self._metrics}:
            self._metrics_of(name).serve(name in self._models)
        self._exporter.serve_at(**user_config["metrics"])

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The REST API. Called by Serve when this replica is constructed."""
        return rest_app(self)

    def admit(self, authorization: str | None, admin: bool = False) -> None:
        """See `Access.admit`."""
        self._access.admit(authorization, admin)

    def caller(self) -> str:
        """See `Access.caller`."""
        return self._access.caller()

    async def find_requests(self) -> Found:
        """What waits and runs in any gateway. A key without the scope `admin` sees its own."""
        told, silent = await self._colleagues.ask(("told", (self.sees(),)))
        return Found(sorted((one for some in told for one in some), key=lambda one: one["since"]), silent)

    async def cancel(self, request_id: str) -> bool:
        """End a request, in whatever gateway it is; False: none has it, or it is another key's."""
        found, _ = await self._colleagues.ask(("cancel", (request_id, self.sees())))
        return any(found)

    def sees(self) -> str | None:
        """See `Access.sees`."""
        return self._access.sees()

    async def _answer(self, question: Question) -> Any:
        method, args = question
        return await self._live.told(*args) if method == "told" else self._live.cancel(*args)

    @contextlib.contextmanager
    def charge(self, request: GenerationRequest) -> Iterator[None]:
        """Count a job's work for the caller's key, while it is submitted; not if the store cannot take it.

        Raises:
            ShuttingDown: the gateway is draining.
            ModelNotAllowed: the key is for other models.
            RateLimited: it has used what it may.
        """
        if self.draining:
            raise ShuttingDown("the server is stopping and takes no new requests")
        with self._access.taking(request, begun=None):
            yield

    async def check_job(self, request: GenerationRequest, priority: Priority, deadline_s: float | None) -> None:
        """Refuse a job that would end too late.

        Raises:
            ModelNotAllowed: the caller's key is for other models.
            DeadlineExceeded: it would.
        """
        self._access.check_model(request.model)
        if deadline_s is None:
            return
        application = app_name(request.model)
        ahead = await self.jobs.ask(JobStore.ahead, request.model, priority)
        _, wait_s = await router_registry.prospect(application, self.caller())
        wait_s += self._backlog.wait_s(request.model, ahead)
        check_deadline(time.time() + deadline_s, wait_s, *router_registry.takes(application, request))

    def models(self) -> dict[str, ModelSpec]:
        """The models of the deployment by name."""
        return self._models

    def states(self) -> dict[str, ModelState]:
        """The state of each model by name."""
        return self._poller.states

    def cluster(self) -> dict[str, Any]:
        """The body of `GET /v1/cluster`."""
        return self._poller.cluster()

    async def end(self) -> None:
        """Called when Serve ends this gateway and the last request has been answered."""
        await self.runner.stop()
        await self._tracing.close()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        """Run one request, on another gang if the first is lost. While it waits, its model's state is yielded.

        Raises:
            ShuttingDown: the gateway is draining.
            ModelNotAllowed: the caller's key is for other models.
            RateLimited: it has used what it may.
            Exception: what `Dispatcher.run` raises.
        """
        async with contextlib.aclosing(self._generate(request)) as reports:
            async for report in reports:
                yield report

    async def _generate(self, request: GenerationRequest, of_job: bool = False) -> AsyncGenerator[Report]:
        """As `generate`; the request of a job waits as long as it must."""
        began, outcome, attempts = time.monotonic(), CANCELLED, 1
        result: GenerationResult | None = None
        key = self.caller()
        metrics = self._metrics_of(request.model)
        trace = self._traced(request)
        self.in_flight += 1
        metrics.began()
        try:
            if self.draining:
                raise ShuttingDown("the server is stopping and takes no new requests")
            with self._access.taking(request, lambda: trace.has_begun):
                request = replace(request, traceparent=trace.traceparent)
                reports = self._live.watched(request, key, self._dispatcher.run(request, key, trace, of_job))
                async with contextlib.aclosing(reports):
                    async for report in reports:
                        if isinstance(report, GenerationResult):
                            outcome, result = OK, report
                            metrics.answered(time.monotonic() - began, report.seconds)
                        elif isinstance(report, Restarted):
                            attempts = report.attempt
                            trace.lost(report.reason)
                        yield report
        except Exception as error:
            outcome = find_status(error).code
            raise
        finally:
            self.in_flight -= 1
            metrics.ended(outcome)
            self._log.ended(request, key, outcome, time.monotonic() - began, attempts, result, trace.trace_id)
            trace.ended(outcome, attempts, result)

    def _complain(self, error: SpecError, *, fatal: bool) -> None:
        """Say what cannot be followed, as an error of the rollout if `fatal`."""
        if fatal:
            raise RuntimeError(str(error)) from None
        logger.error("%s; what was valid before remains so", error)

    def _traced(self, request: GenerationRequest) -> RequestTrace:
        """The trace of a request, which is part of the trace of the call that asks for it, or has asked for its job."""
        call = current_call.get()
        trace = RequestTrace(self._tracing, request, request.traceparent or callers_trace(), self.caller())
        if call and trace.traceparent:
            call.answer[HEADER] = trace.traceparent
        return trace

    async def _run_for(self, owner: str, request: GenerationRequest) -> AsyncGenerator[Report]:
        """Run the request of a job in its owner's name."""
        self._access.act_for(owner)
        async with contextlib.aclosing(self._generate(request, of_job=True)) as reports:
            async for report in reports:
                yield report

    def _room(self) -> dict[str, int]:
        """How many jobs of each model may run: as many as its gangs take, and one that waits, or wakes the model."""
        states = {} if self.draining else self.states()
        each = {name: slots(model) for name, model in self._models.items()}
        return {name: state.ready * each.get(name, 1) + 1 for name, state in states.items()}

    def _metrics_of(self, model: str) -> GatewayMetrics:
        if model not in self._metrics:
            self._metrics[model] = GatewayMetrics(model, OUTCOMES)
        return self._metrics[model]


def _own_name() -> str:
    """The name of this replica's actor, by which gangs see that it is alive; empty outside Serve."""
    try:
        return serve.get_replica_context().replica_id.to_full_id_str()
    except RayServeException:
        return ""


def _short_name() -> str:
    """The same for people."""
    return _own_name().rpartition("#")[2] or "local"
