"""Dispatch: sends one request to a gang of its model, and to another one if the first is lost. For `service.gateway`.

A request comes in; its gang's reports go out, and its place as long as it waits. `service.routing` chooses the gang.
Nothing about a request is random after its admission, seed included, so the picture is the same on every gang.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping
from typing import Any

from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deploy.model_spec import ModelSpec
from service.api.backend import Report, Restarted, Waiting
from service.deadline import check_deadline
from service.names import app_name
from service.rollout.serve_client import gang_handle
from service.state import router_registry
from service.state.live_requests import LiveRequests
from service.state.model_states import ModelState
from service.state.quarantine import LOSSES, Quarantine, fingerprint
from service.state.request_trace import RequestTrace
from service.state.waiting import Place, waiting_for
from service.state.waiting import Waiting as WaitingRequests
from workers.errors import (
    UNKNOWN_LORA,
    GangLost,
    InvalidParameter,
    ModelNotFound,
    ModelUnavailable,
    OutOfMemory,
    QueueFull,
    SprayError,
)
from workers.messages import Answer, Begun, GenerationRequest, GenerationResult, Preview, Profiled, StepEvent

logger = logging.getLogger("ray.serve")

PAUSE_S = 0.7
"""Before another attempt after a replica ended, so that it has left the routing table by then."""

RECOVERY_S = 5.0
"""Before another attempt after Ray ended a replica for what its node lacks, memory most of all: one that begins at once
would most likely end likewise. Serve still names the replica until its next look."""

UNREACHED = 5
"""Attempts of a request of which such an error ends the last before it has begun: then it may be that no gang can be
told of it at all, as by a gateway and a gang of two versions."""

PATIENCE_S = 5.0
"""A waiting caller hears the state of its model this often; proxies close connections that are silent for long."""

REMOVED = ModelState("running", "the model was removed; its gangs finish what they compute")
"""Of a model that is not in the deployment anymore."""

KNOWN_S = 5.0
"""For Serve to know a model of the table: it is looked at every second, and may have come just now."""

LOOK_S = 0.05


class Dispatcher:
    """The requests of one gateway on their way to gangs.

    Args:
        gateway: the name of its actor, by which gangs see that somebody still waits for what they compute.
        states: the state of each model by name.
        live: is told when a request begins, and when it has lost its gang.
        on_loss: called with the model's name when a request has lost its gang.
    """

    def __init__(
        self,
        gateway: str,
        states: Callable[[], Mapping[str, ModelState]],
        live: LiveRequests,
        on_loss: Callable[[str], None],
    ) -> None:
        self._gateway, self._states, self._live, self._on_loss = gateway, states, live, on_loss
        self._models: Mapping[str, ModelSpec] = {}
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._quarantine = Quarantine()

    def follow(self, models: Mapping[str, ModelSpec]) -> None:
        """Send requests to the gangs of these models from now on."""
        self._models = models
        self._handles = {name: handle for name, handle in self._handles.items() if name in models}
        self._quarantine.follow()

    def greet(self, model: str) -> None:
        """Create the router of a model that Serve knows. Its gangs report through it, and requests wait for it."""
        if model not in self._handles:
            self._handles[model] = gang_handle(app_name(model)).options(stream=True)

    async def run(
        self, request: GenerationRequest, caller: str, trace: RequestTrace, of_job: bool = False
    ) -> AsyncGenerator[Report]:
        """Run one request, on another gang if the first is lost.

        Args:
            request: what to draw.
            caller: the name of the API key that asks.
            trace: is told what happens to the request.
            of_job: nobody waits for the answer, so the request waits as long as it must.

        Raises:
            QueueFull: too many requests wait for the model, or it would wait too long.
            DeadlineExceeded: it would be answered too late.
            RequestError: the model refuses the request.
            RequestFailed: it failed, and its gang is still sound.
            ModelUnavailable: no gang of the model runs, and none can start; or none could be reached; or its gangs lack
                an adapter of the deployment.
            ModelNotFound: the model was removed while the request waited.
            GangLost: it lost as many gangs as it may.
            RequestQuarantined: the same request did so before.
        """
        known_as = fingerprint(caller, request, of_job)
        place, attempt = Place(time.time(), caller, of_job), 1
        waiting = waiting_for(app_name(request.model))
        self._quarantine.check(known_as)
        await self._enter(request, place, waiting)
        while True:
            begun = False
            waiting.enter(request.request_id, place)
            trace.waits()
            try:
                answer = (await self._handle(request.model)).generate.remote(request, self._gateway)
                assert isinstance(answer, DeploymentResponseGenerator)
                async with contextlib.aclosing(self._attended(request.model, answer, request.request_id)) as reports:
                    async for report in reports:
                        if isinstance(report, Begun):
                            begun = True
                            self._live.begun(request.request_id)
                            trace.begun()
                            continue
                        if isinstance(report, GenerationResult):  # here: who has it may not ask for what follows
                            self._quarantine.clear(known_as)
                        yield report
                return
            except DeploymentUnavailableError:
                raise ModelUnavailable(f"{request.model!r} cannot be started; the server's log says why") from None
            except (RayError, SprayError) as error:
                cause = await self._loss(request, known_as, error)
                await self._lost(request, known_as, cause, begun, attempt)
            finally:
                waiting.leave(request.request_id)
            attempt += 1
            yield Restarted(attempt, f"the ranks of {request.model!r} were lost", begun)  # the log has why

    async def _enter(self, request: GenerationRequest, place: Place, waiting: WaitingRequests) -> None:
        """Let a request wait among the others, unless it would have to wait too long."""
        before = waiting.callers
        waiting.enter(request.request_id, place)  # at once, so that those who come meanwhile count it
        try:
            await self._check_queue(request, place, before)
        except BaseException:
            waiting.leave(request.request_id)
            raise

    async def _check_queue(self, request: GenerationRequest, place: Place, waiting: int) -> None:
        """Refuse a request that would have to wait too long, or among too many.

        Raises:
            QueueFull: it would.
            DeadlineExceeded: it would be too late then.
        """
        model = self._models.get(request.model)
        if model is None or (
            request.deadline_at is None and (place.of_job or (not waiting and model.max_queued_s is None))
        ):
            return
        ahead, wait_s = await router_registry.prospect(app_name(model.name), place.caller)
        if request.deadline_at is not None:
            check_deadline(request.deadline_at, wait_s, *router_registry.takes(app_name(model.name), request))
        if place.of_job:  # which was accepted, and whose caller does not hold a connection
            return
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

    async def _loss(self, request: GenerationRequest, known_as: str, error: Exception) -> Exception:
        """What a gang was lost to. Any other error is raised: another gang would fail the same way."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, OutOfMemory) and not cause.agreed:
            await self._quarantine.count(known_as)  # it has cost a gang, and would cost the next one
        if self._lacks_an_adapter(request, cause):
            raise ModelUnavailable(f"{request.model!r}: {cause}; it is deployed, try again") from None
        if isinstance(cause, TaskCancelledError) or not isinstance(cause, GangLost | RayError):
            raise cause from None
        return cause

    def _lacks_an_adapter(self, request: GenerationRequest, cause: Exception) -> bool:
        """Whether a gang lacks an adapter that the deployment has, which is no fault of the caller."""
        if not isinstance(cause, InvalidParameter) or cause.code != UNKNOWN_LORA or request.model not in self._models:
            return False
        deployed = {lora.name for lora in self._models[request.model].loras}
        return deployed.issuperset(name for name, _ in request.loras)

    async def _lost(
        self, request: GenerationRequest, known_as: str, cause: Exception, begun: bool, attempt: int
    ) -> None:
        """Return if the request may go to another gang.

        Raises:
            GangLost: it has cost as many as it may.
            ModelUnavailable: it has reached none.
        """
        logger.warning("request %s lost its ranks: %s", request.request_id, cause)
        self._on_loss(request.model)
        router_registry.lose(app_name(request.model), request.request_id)
        self._live.lost(request.request_id)
        if begun and await self._quarantine.count(known_as) >= LOSSES:
            raise GangLost(f"{request.model!r} lost its ranks {LOSSES} times on this request; it is not tried again")
        if isinstance(cause, RayActorError):
            await asyncio.sleep(PAUSE_S)
        elif isinstance(cause, RayError) and not isinstance(cause, ObjectLostError):
            if not begun and attempt >= UNREACHED:
                raise ModelUnavailable(f"{request.model!r} cannot be reached; the server's log says why")
            await asyncio.sleep(RECOVERY_S)

    async def _handle(self, model: str) -> DeploymentHandle[Any]:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KNOWN_S):
                while model not in self._handles:
                    await asyncio.sleep(LOOK_S)
        if model not in self._handles:
            raise ModelUnavailable(f"{model!r} is being deployed; try again in a moment")
        return self._handles[model]

    async def _attended(
        self, model: str, answer: DeploymentResponseGenerator[Any], request_id: str = ""
    ) -> AsyncGenerator[Begun | StepEvent | Preview | Profiled | GenerationResult | Waiting]:
        """A gang's reports, and the request's place whenever the next report takes long.

        Serve lets a request wait forever, even if no gang can start; such a request ends here.
        """
        told = _with_result(answer)
        coming = asyncio.ensure_future(anext(told, None))
        looking: asyncio.Future[Collection[str]] | None = None
        unfinished, begun = True, False
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
                    begun = begun or isinstance(report, Begun)
                    yield report
                    coming = asyncio.ensure_future(anext(told, None))
                    continue
                state = self._states().get(model)
                if state is None:  # it was removed: its gangs finish what they compute, and begin nothing
                    if not begun:
                        raise ModelNotFound(f"the model {model!r} was removed")
                    # Beside the reports, which say that the request goes on: the controller may be away.
                    if looking is not None and looking.done():
                        gone = looking.exception() is None and app_name(model) not in looking.result()
                        if gone and not coming.done():
                            raise ModelNotFound(f"the model {model!r} was removed")
                    if looking is None or looking.done():
                        looking = asyncio.ensure_future(asyncio.to_thread(_applications))
                    yield Waiting(REMOVED)
                    continue
                if state.state == "failed" and not begun:
                    raise ModelUnavailable(f"{model!r} cannot be started: {state.reason}")
                ahead = await router_registry.standing(app_name(model), request_id)
                yield Waiting(state, ahead.ahead + 1, ahead.wait_s) if ahead else Waiting(state)
        finally:
            if unfinished:  # the caller left, maybe while it held a report: free the gang at once
                coming.cancel()
                answer.cancel()  # type: ignore[no-untyped-call]


async def _with_result(reports: AsyncIterator[Any]) -> AsyncGenerator[Any]:
    """A gang's reports, with the result in place of its `Answer`. By then the gang may run another request."""
    async for report in reports:
        yield await report.result if isinstance(report, Answer) else report


def _applications() -> Collection[str]:
    return serve.status().applications
