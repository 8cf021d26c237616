"""The gateway: a Serve deployment that knows the models and sends each request to a gang. The API's backend.

Its table of models comes as `user_config`, so that it changes without a restart. A request whose gang is lost runs
again on another one. Nothing about it is random after its admission, seed included, so the picture is the same.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import time
from collections.abc import AsyncGenerator, Collection
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deploy.spec import ModelSpec
from service.api.errors import STATUS, UNEXPECTED, find_status
from service.api.rest import rest_app
from service.names import GANG, app_name
from service.state.model_states import ModelState
from service.state.poller import Poller
from service.state.prefetch import Prefetch
from workers.errors import (
    Forbidden,
    GangLost,
    ModelNotFound,
    ModelUnavailable,
    QueueFull,
    ShuttingDown,
    SprayError,
    Unauthorized,
    UnsupportedMediaType,
)
from workers.exporter import Exporter, share_values
from workers.gang.ray_internals import keep_replica_on_node_ip
from workers.messages import GenerationRequest, GenerationResult, StepEvent
from workers.metrics import GatewayMetrics

logger = logging.getLogger("ray.serve")

ATTEMPTS = 3
"""How many gangs one request may lose. A request that brings down each of them is not given a fourth."""

PAUSE_S = 0.7
"""Before another attempt, so that a lost gang has left the routing table by then."""

PATIENCE_S = 5.0
"""A waiting caller hears the state of its model this often; proxies close connections that are silent for long."""

OK, CANCELLED = "ok", "cancelled"
NOT_ADMITTED = (Unauthorized, Forbidden, UnsupportedMediaType)
OUTCOMES = {OK, UNEXPECTED.code, *(status.code for error, status in STATUS.items() if error not in NOT_ADMITTED)}
"""How an admitted request can end, for metrics. CANCELLED is among the errors' codes."""

UNSET: list[str] = []
"""The API keys before the first configuration: nobody has one."""


class Gateway:
    """One replica of the gateway.

    Args:
        instance_id: tells this deployment from another that may answer on the same port.
    """

    def __init__(self, instance_id: str) -> None:
        keep_replica_on_node_ip()
        self.instance_id = instance_id
        self.max_body_bytes = 1 << 20
        self.draining = False
        self.local_only = False
        self.in_flight = 0
        self._keys: list[str] | None = UNSET
        self._models: dict[str, ModelSpec] = {}
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._poller = Poller()
        self._prefetch = Prefetch()
        self._exporter = Exporter(share_values())
        self._metrics: dict[str, GatewayMetrics] = {}

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
        self.max_body_bytes = user_config["max_body_bytes"]
        try:
            self._keys = api_keys(user_config["api_keys_env"])
        except RuntimeError as error:
            if self._keys is UNSET:
                raise
            logger.error("%s; the former keys remain valid", error)
        self._poller.follow(self._models)
        self._prefetch.follow(specs, user_config["models_folder"])
        for name in self._models:
            self._metrics_of(name)
        self._exporter.serve_at(**user_config["metrics"])

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The REST API. Called by Serve when this replica is constructed."""
        return rest_app(self)

    def admit(self, authorization: str | None) -> None:
        """Reject callers without a valid API key, if the deployment has keys.

        Args:
            authorization: the `Authorization` header; None if there is none.

        Raises:
            Unauthorized: the header has no valid key.
        """
        if self._keys is None:
            return
        scheme, _, given = (authorization or "").partition(" ")
        given = given.strip(" \t")  # not all that Unicode calls a space: those are bytes of letters
        # Servers decode headers as latin-1, whatever clients mean: their letters may be those of UTF-8, or the bytes.
        meant = given.encode(), given.encode("latin-1", "replace")
        if scheme.lower() != "bearer" or not any(
            hmac.compare_digest(sent, key.encode()) for key in self._keys for sent in meant
        ):
            raise Unauthorized("a valid API key is required, as 'Authorization: Bearer KEY'")

    def models(self) -> dict[str, ModelSpec]:
        """The models of the deployment by name."""
        return self._models

    def states(self) -> dict[str, ModelState]:
        """The state of each model by name."""
        return self._poller.states

    def cluster(self) -> dict[str, Any]:
        """The body of `GET /v1/cluster`."""
        for name in self._models:
            with contextlib.suppress(ModelUnavailable):  # it is being deployed
                self._handle(name)  # creates its router, through which the gangs report
        return self._poller.cluster()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepEvent | GenerationResult | ModelState]:
        """Run one request, on another gang if the first is lost. While it waits, its model's state is yielded.

        Raises:
            ShuttingDown: the gateway is draining.
            QueueFull: too many requests wait for the model.
            RequestError: the model refuses the request.
            RequestFailed: it failed, and its gang is still sound.
            ModelUnavailable: no gang of the model runs, and none can start.
            ModelNotFound: the model was removed while the request waited.
            GangLost: it lost every gang that took it.
        """
        began, outcome = time.monotonic(), CANCELLED
        metrics = self._metrics_of(request.model)
        self.in_flight += 1
        metrics.began()
        try:
            if self.draining:
                raise ShuttingDown("the server is stopping and takes no new requests")
            async with contextlib.aclosing(self._generate(request)) as reports:
                async for report in reports:
                    if isinstance(report, GenerationResult):
                        outcome = OK
                        metrics.answered(time.monotonic() - began, report.seconds)
                    yield report
        except Exception as error:
            outcome = find_status(error).code
            raise
        finally:
            self.in_flight -= 1
            metrics.ended(outcome)

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[StepEvent | GenerationResult | ModelState]:
        losses = 0
        while losses < ATTEMPTS:
            try:
                answer = self._handle(request.model).generate.remote(request)
                assert isinstance(answer, DeploymentResponseGenerator)
                async with contextlib.aclosing(self._attended(request.model, answer)) as reports:
                    async for report in reports:
                        yield report
                return
            except BackPressureError:
                if not losses:
                    raise QueueFull(f"too many requests wait for {request.model!r}; try again later") from None
                await asyncio.sleep(PAUSE_S)  # it was accepted before its gang was lost, so it keeps waiting
            except DeploymentUnavailableError:
                raise ModelUnavailable(f"{request.model!r} cannot be started; the server's log says why") from None
            except (RayActorError, RayTaskError, SprayError) as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                if not isinstance(cause, GangLost | RayActorError):
                    raise cause from None  # the gang is sound: another would fail the same way
                losses += 1
                self._metrics_of(request.model).lost()
                logger.warning("request %s lost its ranks, time %d: %s", request.request_id, losses, cause)
                await asyncio.sleep(PAUSE_S)
        raise GangLost(f"{request.model!r} lost its ranks {ATTEMPTS} times on this request; it is not tried again")

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

    async def _attended(
        self, model: str, answer: DeploymentResponseGenerator[Any]
    ) -> AsyncGenerator[StepEvent | GenerationResult | ModelState]:
        """A gang's reports, and the model's state whenever the next report takes long.

        Serve lets a request wait forever, even if no gang can start; such a request ends here.
        """
        coming = asyncio.ensure_future(anext(answer, None))
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
                    coming = asyncio.ensure_future(anext(answer, None))
                    continue
                state = self.states().get(model)
                if state is None and app_name(model) not in await asyncio.to_thread(_applications):
                    raise ModelNotFound(f"the model {model!r} was removed")
                if state is not None and state.state == "failed":
                    raise ModelUnavailable(f"{model!r} cannot be started: {state.reason}")
                if state is not None:  # else it was removed, and its gangs finish their requests
                    yield state
        finally:
            if unfinished:  # the caller left, maybe while it held a report: free the gang at once
                coming.cancel()
                answer.cancel()  # type: ignore[no-untyped-call]


def _applications() -> Collection[str]:
    return serve.status().applications


def api_keys(variable: str | None) -> list[str] | None:
    """The comma-separated API keys in an environment variable; None if no variable is named: anybody may call.

    Raises:
        RuntimeError: the variable holds no key.
    """
    if variable is None:
        return None
    keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if not keys:
        raise RuntimeError(f"auth.api_keys_env is {variable}, but the gateway's environment holds no keys in it")
    return keys
