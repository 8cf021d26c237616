"""The gateway: a Serve deployment that knows the models and sends each request to a gang. The API's backend.

Its table of models comes as `user_config`, so that it changes without a restart. A request whose gang is lost runs
again on another one. Nothing about it is random after its admission, seed included, so the picture is the same.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deploy.api_keys import ApiKey
from deploy.spec import Idempotency, ModelSpec, Outputs, SpecError
from service.api.backend import Found, Report, Restarted, Waiting
from service.api.errors import STATUS, UNEXPECTED, find_status
from service.api.observed import callers_trace, current_call, key_name
from service.api.rest import rest_app
from service.deadline import check_deadline
from service.jobs.backlog import JobBacklog
from service.jobs.lost_runners import LostRunners
from service.jobs.records import Priority
from service.jobs.runner import Runner
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.jobs.webhooks import Webhooks
from service.names import GANG, app_name
from service.rpc.methods import GrpcMethods
from service.state import router_registry, shared_turns
from service.state.exchange import Colleagues, Question
from service.state.idempotency import IdempotencyKeys
from service.state.key_use import SharedUse
from service.state.keyring import Keyring
from service.state.live_requests import LiveRequests
from service.state.model_states import ModelState
from service.state.outputs import OutputStore
from service.state.poller import Poller
from service.state.prefetch import Prefetch
from service.state.quarantine import LOSSES, Quarantine, fingerprint
from service.state.request_log import RequestLog
from service.state.request_trace import RequestTrace
from service.state.waiting import Place, waiting_for
from workers.errors import (
    AdminOnly,
    Forbidden,
    GangLost,
    GatewaySilent,
    IdempotencyKeyReused,
    JobNotFound,
    JobNotReady,
    JobsUnavailable,
    KeysUnavailable,
    ModelNotAllowed,
    ModelNotFound,
    ModelUnavailable,
    OutOfMemory,
    OutputsFull,
    OutputsUnavailable,
    QueueFull,
    RequestNotFound,
    ShuttingDown,
    SprayError,
    Unauthorized,
    UnsupportedMediaType,
)
from workers.exporter import Exporter, share_values
from workers.gang.elastic import slots
from workers.gang.ray_internals import keep_replica_on_node_ip
from workers.messages import Answer, Begun, GenerationRequest, GenerationResult, Preview, Profiled, StepEvent
from workers.observing import GatewayMetrics
from workers.tracing import HEADER, OFF, Tracing

logger = logging.getLogger("ray.serve")

PAUSE_S = 0.7
"""Before another attempt after a replica ended, so that it has left the routing table by then."""

PATIENCE_S = 5.0
"""A waiting caller hears the state of its model this often; proxies close connections that are silent for long."""

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

_caller: ContextVar[ApiKey | None] = ContextVar("caller", default=None)
"""The API key of the request that this task answers; None where none is needed."""

_trace: ContextVar[RequestTrace] = ContextVar("trace")
"""Of the request that this task runs."""


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
        self._keyring = ring = Keyring()
        self._key_use = SharedUse(_short_name(), lambda: ring.limited, ring.used, ring.hear, shared_turns.start_keeper)
        self._models: dict[str, ModelSpec] = {}
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._poller = Poller(self._backlog.share, self._greet)
        self._prefetch = Prefetch()
        self._quarantine = Quarantine()
        self._exporter = Exporter(share_values())
        self._metrics: dict[str, GatewayMetrics] = {}
        self._log = RequestLog()
        self._tracing = Tracing()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve at start and whenever the model table changes; see `service.app.gateway_application`.

        Raises:
            RuntimeError: at start, the variable for the API keys holds none; nobody could call.
        """
        specs = [ModelSpec.model_validate(model) for model in user_config["models"]]
        self._models = {spec.name: spec for spec in specs}
        self._handles = {name: handle for name, handle in self._handles.items() if name in self._models}
        self.draining = user_config["draining"]
        self.local_only = user_config.get("local_only", False)  # a running older version deployed none
        self.cors_origins = tuple(user_config.get("cors_origins", ()))  # likewise
        self.media_hosts = tuple(user_config.get("media_hosts", ()))  # likewise
        self._log.follow(**user_config.get("log", NO_LOG))  # likewise
        self._tracing.follow(**user_config.get("tracing", OFF))  # likewise
        self._backlog.gateways = user_config.get("gateways", 1)
        several = self._backlog.gateways > 1
        shared_turns.share(several)
        self._colleagues.follow(several and ray.is_initialized())
        self._key_use.follow(several and ray.is_initialized())
        self.max_body_bytes = user_config["max_body_bytes"]
        outputs = user_config.get("outputs", Outputs().model_dump())  # an older version deployed none
        try:
            self.jobs.follow(**user_config.get("jobs", NO_JOBS), keep_s=outputs["ttl_s"])
            self.webhooks.follow(user_config.get("webhook_hosts", ()), user_config.get("webhook_key_env"))  # likewise
            self._keyring.configure(user_config["api_keys_env"], user_config.get("api_keys_file"))
        except SpecError as error:
            if not self._keyring.configured:
                raise RuntimeError(str(error)) from None
            logger.error("%s; what was valid before remains so", error)
        self._poller.follow(self._models)
        self._quarantine.follow()
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
        """Reject callers without a valid API key, if the deployment has keys.

        Args:
            authorization: the `Authorization` header; None if there is none.
            admin: the call concerns what others have asked for.

        Raises:
            Unauthorized: the header has no valid key.
            AdminOnly: the key has not the scope.
        """
        _caller.set(None)
        key_name.set("")
        if self._keyring.open:
            return
        scheme, _, given = (authorization or "").partition(" ")
        key = self._keyring.find(given.strip(" \t"))  # not all that Unicode calls a space: those are bytes of letters
        if scheme.lower() != "bearer" or key is None:
            raise Unauthorized("a valid API key is required, as 'Authorization: Bearer KEY'")
        if admin and not key.admin:
            raise AdminOnly(f"the key {key.name!r} has the scope {key.scope!r}; this needs 'admin'")
        _caller.set(key)
        key_name.set(key.name)

    def caller(self) -> str:
        """The name of the API key that `admit` has found for this call; empty: none is needed."""
        key = _caller.get()
        return key.name if key else ""

    async def find_requests(self) -> Found:
        """What waits and runs in any gateway. A key without the scope `admin` sees its own."""
        told, silent = await self._colleagues.ask(("told", (self.sees(),)))
        return Found(sorted((one for some in told for one in some), key=lambda one: one["since"]), silent)

    async def cancel(self, request_id: str) -> bool:
        """End a request, in whatever gateway it is; False: none has it, or it is another key's."""
        found, _ = await self._colleagues.ask(("cancel", (request_id, self.sees())))
        return any(found)

    def sees(self) -> str | None:
        """The name of the API key whose requests and jobs this call may see and end; None: all."""
        key = _caller.get()
        return None if key is None or key.admin else key.name

    async def _answer(self, question: Question) -> Any:
        method, args = question
        return await self._live.told(*args) if method == "told" else self._live.cancel(*args)

    def charge(self, request: GenerationRequest) -> None:
        """Count a job's work for the caller's key.

        Raises:
            ShuttingDown: the gateway is draining.
            ModelNotAllowed: the key is for other models.
            RateLimited: it has used what it may.
        """
        if self.draining:
            raise ShuttingDown("the server is stopping and takes no new requests")
        with self._allowed(request):
            pass

    async def check_job(self, request: GenerationRequest, priority: Priority, deadline_s: float | None) -> None:
        """Refuse a job that would end too late.

        Raises:
            ModelNotAllowed: the caller's key is for other models.
            DeadlineExceeded: it would.
        """
        _key_for(request.model)
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
        for name in self._models:
            self._greet(name)
        return self._poller.cluster()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        """Run one request, on another gang if the first is lost. While it waits, its model's state is yielded.

        Raises:
            ShuttingDown: the gateway is draining.
            QueueFull: too many requests wait for the model.
            RequestError: the model refuses the request.
            RequestFailed: it failed, and its gang is still sound.
            ModelUnavailable: no gang of the model runs, and none can start.
            ModelNotFound: the model was removed while the request waited.
            GangLost: it lost as many gangs as it may.
            RequestQuarantined: the same request did so before.
        """
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
            with self._allowed(request):
                request = replace(request, traceparent=trace.traceparent)
                reports = self._live.watched(request, self.caller(), self._generate(request))
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

    def _traced(self, request: GenerationRequest) -> RequestTrace:
        """The trace of a request, which is part of the trace of the call that asks for it, or has asked for its job."""
        call = current_call.get()
        trace = RequestTrace(self._tracing, request, request.traceparent or callers_trace(), self.caller())
        if call and trace.traceparent:
            call.answer[HEADER] = trace.traceparent
        _trace.set(trace)
        return trace

    async def _run_for(self, owner: str, request: GenerationRequest) -> AsyncGenerator[Report]:
        """Run the request of a job in its owner's name. What the owner may was settled when it was submitted."""
        _caller.set(ApiKey(name=owner, sha256="0" * 64) if owner else None)
        async with contextlib.aclosing(self.generate(request)) as reports:
            async for report in reports:
                yield report

    def _room(self) -> dict[str, int]:
        """How many jobs of each model may run: as many as its gangs take, and one that waits, or wakes the model."""
        states = {} if self.draining else self.states()
        each = {name: slots(model) for name, model in self._models.items()}
        return {name: state.replicas.get("RUNNING", 0) * each.get(name, 1) + 1 for name, state in states.items()}

    @contextlib.contextmanager
    def _allowed(self, request: GenerationRequest) -> Iterator[None]:
        """What the caller's key allows; it counts as long as the request waits or runs.

        Raises:
            ModelNotAllowed: the key is for other models.
            RateLimited: it has used what it may.
        """
        key = _key_for(request.model)
        if key is None:
            yield
            return
        with self._keyring.allowance(key).take(key, request.work):
            yield

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        caller, trace = self.caller(), _trace.get()
        known_as, place, attempt = fingerprint(caller, request), Place(time.time(), caller), 1
        waiting = waiting_for(app_name(request.model))
        self._quarantine.check(known_as)
        before = len(waiting)
        waiting.enter(request.request_id, place)  # at once, so that those who come meanwhile count it
        try:
            await self._check_queue(request, before)
        except BaseException:
            waiting.leave(request.request_id)
            raise
        while True:
            begun = False
            waiting.enter(request.request_id, place)
            trace.waits()
            try:
                answer = self._handle(request.model).generate.remote(request, _own_name())
                assert isinstance(answer, DeploymentResponseGenerator)
                async with contextlib.aclosing(self._attended(request.model, answer, request.request_id)) as reports:
                    async for report in reports:
                        if isinstance(report, Begun):
                            begun = True
                            self._live.begun(request.request_id)
                            trace.begun()
                        else:
                            yield report
                await self._quarantine.clear(known_as)
                return
            except DeploymentUnavailableError:
                raise ModelUnavailable(f"{request.model!r} cannot be started; the server's log says why") from None
            except (RayActorError, RayTaskError, ObjectLostError, SprayError) as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                if isinstance(cause, OutOfMemory) and not cause.agreed:
                    await self._quarantine.count(known_as)  # it has cost a gang, and would cost the next one
                if not isinstance(cause, GangLost | RayActorError | ObjectLostError):
                    raise cause from None  # another gang would fail the same way
                await self._lost(request, known_as, cause, begun)
            finally:
                waiting.leave(request.request_id)
            attempt += 1
            yield Restarted(attempt, f"the ranks of {request.model!r} were lost", begun)  # the log has why

    async def _check_queue(self, request: GenerationRequest, waiting: int) -> None:
        """Refuse a request that would have to wait too long, or among too many.

        Raises:
            QueueFull: it would.
            DeadlineExceeded: it would be too late then.
        """
        model = self._models.get(request.model)
        if model is None or (not waiting and request.deadline_at is None and model.max_queued_s is None):
            return
        ahead, wait_s = await router_registry.prospect(app_name(model.name), self.caller())
        if request.deadline_at is not None:
            check_deadline(request.deadline_at, wait_s, *router_registry.takes(app_name(model.name), request))
        if waiting >= model.max_queued:
            raise QueueFull(
                f"{waiting} requests wait for {model.name!r}; try again later", wait_s / (ahead + 1) or None
            )
        if model.max_queued_s is not None and wait_s > model.max_queued_s:
            raise QueueFull(
                f"a request for {model.name!r} would have to wait {wait_s:.0f} s, at most {model.max_queued_s:g} s is "
                "allowed; try again later",
                wait_s - model.max_queued_s,
            )

    async def _lost(self, request: GenerationRequest, known_as: str, cause: Exception, begun: bool) -> None:
        """Return if the request may go to another gang.

        Raises:
            GangLost: it has cost as many as it may.
        """
        logger.warning("request %s lost its ranks: %s", request.request_id, cause)
        self._metrics_of(request.model).lost()
        router_registry.lose(app_name(request.model), request.request_id)
        self._live.lost(request.request_id)
        if begun and await self._quarantine.count(known_as) >= LOSSES:
            raise GangLost(f"{request.model!r} lost its ranks {LOSSES} times on this request; it is not tried again")
        if isinstance(cause, RayActorError):
            await asyncio.sleep(PAUSE_S)

    def _metrics_of(self, model: str) -> GatewayMetrics:
        if model not in self._metrics:
            self._metrics[model] = GatewayMetrics(model, OUTCOMES)
        return self._metrics[model]

    def _handle(self, model: str) -> DeploymentHandle[Any]:
        if model not in self._handles:
            try:
                handle: DeploymentHandle[Any] = serve.get_deployment_handle(GANG, app_name(model))
            except KeyError:
                raise ModelUnavailable(f"{model!r} is being deployed; try again in a moment") from None
            self._handles[model] = handle.options(stream=True)
        return self._handles[model]

    def _greet(self, model: str) -> None:
        """Create a model's router, through which its gangs report. Its first request would wait a second for it."""
        with contextlib.suppress(ModelUnavailable):  # it is being deployed
            self._handle(model)

    async def _attended(
        self, model: str, answer: DeploymentResponseGenerator[Any], request_id: str = ""
    ) -> AsyncGenerator[Begun | StepEvent | Preview | Profiled | GenerationResult | Waiting]:
        """A gang's reports, and the request's place whenever the next report takes long.

        Serve lets a request wait forever, even if no gang can start; such a request ends here.
        """
        told = _with_result(answer)
        coming = asyncio.ensure_future(anext(told, None))
        unfinished = True
        try:
            while True:
                # Not wait_for: it would cancel the pending report, and with it the request, at every timeout.
                done, _ = await asyncio.wait([coming], timeout=PATIENCE_S)
                if done:
                    unfinished = False  # it has ended if it raises or yields nothing
                    report = coming.result()
                    if report is None:
                        return
                    unfinished = True
                    yield report
                    coming = asyncio.ensure_future(anext(told, None))
                    continue
                state = self.states().get(model)
                if state is None and app_name(model) not in await asyncio.to_thread(_applications):
                    raise ModelNotFound(f"the model {model!r} was removed")
                if state is not None and state.state == "failed":
                    raise ModelUnavailable(f"{model!r} cannot be started: {state.reason}")
                if state is not None:  # else it was removed, and its gangs finish their requests
                    ahead = await router_registry.standing(app_name(model), request_id)
                    yield Waiting(state, ahead.ahead + 1, ahead.wait_s) if ahead else Waiting(state)
        finally:
            if unfinished:  # the caller left, maybe while it held a report: free the gang at once
                coming.cancel()
                answer.cancel()  # type: ignore[no-untyped-call]


def _key_for(model: str) -> ApiKey | None:
    """The caller's key; None: no key is needed.

    Raises:
        ModelNotAllowed: it is for other models.
    """
    key = _caller.get()
    if key is not None and key.models is not None and model not in key.models:
        raise ModelNotAllowed(f"the key {key.name!r} may not ask {model!r}; it may: {', '.join(key.models)}")
    return key


async def _with_result(reports: AsyncIterator[Any]) -> AsyncGenerator[Any]:
    """A gang's reports, with the result in place of its `Answer`. By then the gang may run another request."""
    async for report in reports:
        yield await report.result if isinstance(report, Answer) else report


def _own_name() -> str:
    """The name of this replica's actor, by which gangs see that it is alive; empty outside Serve."""
    try:
        return serve.get_replica_context().replica_id.to_full_id_str()
    except RayServeException:
        return ""


def _short_name() -> str:
    """The same for people."""
    return _own_name().rpartition("#")[2] or "local"


def _applications() -> Collection[str]:
    return serve.status().applications
