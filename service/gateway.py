"""Gateway: the hall behind the doors. A Serve deployment that knows the models and hands requests to their gangs.

Its model table comes as `user_config`, so that it changes without a restart. A request whose gang is lost runs again
on the next one: it was settled at admission, seed included, so the picture is the same.
"""

import asyncio
import contextlib
import hmac
import logging
import math
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deploy.spec import ModelSpec
from service import reports
from service.cluster import ModelState, cluster_object, model_state
from service.names import GANG, app_name
from service.rest import rest_app
from workers.errors import GangLost, QueueFull, ShuttingDown, SprayError, Unauthorized
from workers.messages import GenerationRequest, GenerationResult, StepEvent
from workers.placement import Node, alive_nodes, free_resources

logger = logging.getLogger("ray.serve")

ATTEMPTS = 3
"""How often one request may lose its ranks; one that brings them down each time is not worth a fourth."""

PAUSE_S = 0.7
"""Before another attempt, so that a lost gang is gone from the routing table."""

LOOK_PERIOD_S = 2.0
"""How often the state of the models is looked at, to log what changes."""


class Gateway:
    """One replica of the gateway.

    Args:
        instance_id: tells this deployment from another that may answer on the same port.
    """

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        self.max_body_bytes = 1 << 20
        self.draining = False
        self.in_flight = 0
        self._keys: list[str] | None = None
        self._models: dict[str, ModelSpec] = {}
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._states: dict[str, ModelState] = {}
        self._looked_at = -math.inf
        self._looking = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve at start and whenever the model table changes; see `service.app.gateway_application`.

        Raises:
            RuntimeError: the variable that should hold the API keys is empty: then nobody may call.
        """
        specs = [ModelSpec.model_validate(model) for model in user_config["models"]]
        self._models = {spec.name: spec for spec in specs}
        self._handles = {name: handle for name, handle in self._handles.items() if name in self._models}
        self.draining = user_config["draining"]
        self.max_body_bytes = user_config["max_body_bytes"]
        self._keys = _api_keys(user_config["api_keys_env"])
        self._looked_at = -math.inf
        self._watcher = self._watcher or asyncio.create_task(self._watch())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The REST door; Serve asks for it once this replica is constructed."""
        return rest_app(self)

    def admit(self, authorization: str | None) -> None:
        """Let a caller in, or not.

        Args:
            authorization: the header of that name.

        Raises:
            Unauthorized: keys are asked for, and it has none of them.
        """
        if self._keys is None:
            return
        given = (authorization or "").removeprefix("Bearer ").encode()
        if not any(hmac.compare_digest(given, key.encode()) for key in self._keys):
            raise Unauthorized("a valid API key is needed, as 'Authorization: Bearer KEY'")

    def models(self) -> dict[str, ModelSpec]:
        """The models of the deployment by name."""
        return self._models

    async def states(self) -> dict[str, ModelState]:
        """The state of each model by name; at most half a second old."""
        async with self._looking:
            if time.monotonic() - self._looked_at > 0.5:
                status, nodes, free = await asyncio.to_thread(_look)
                self._states = {
                    name: model_state(model, status, nodes, free, **_reported(name))
                    for name, model in self._models.items()
                }
                self._looked_at = time.monotonic()
            return self._states

    async def cluster(self) -> dict[str, Any]:
        """The body of `GET /v1/cluster`."""
        for name in self._models:
            with contextlib.suppress(GangLost):  # it is being deployed
                self._handle(name)  # its router hears what the gangs say
        states = await self.states()
        _, nodes, free = await asyncio.to_thread(_look)
        known = [(model, states[name]) for name, model in self._models.items() if name in states]  # it may just change
        return cluster_object(known, nodes, free)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepEvent | GenerationResult]:
        """Run one request, on another gang if the first is lost.

        Raises:
            ShuttingDown: the deployment takes no new requests.
            QueueFull: too many requests wait for the model.
            RequestError: the request does not suit the model.
            RequestFailed: it failed on a sound gang.
            GangLost: every gang it was given to was lost.
        """
        if self.draining:
            raise ShuttingDown("the server is about to stop and takes no new requests")
        self.in_flight += 1
        try:
            async for report in self._generate(request):
                yield report
        finally:
            self.in_flight -= 1

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[StepEvent | GenerationResult]:
        losses = 0
        while losses < ATTEMPTS:
            try:
                answer = self._handle(request.model).generate.remote(request)
                assert isinstance(answer, DeploymentResponseGenerator)
                async for report in answer:
                    yield report
                return
            except BackPressureError:
                if not losses:
                    raise QueueFull(f"too many requests wait for {request.model!r}; try again later") from None
                await asyncio.sleep(PAUSE_S)  # it was accepted before, so it waits for its place
            except DeploymentUnavailableError:
                raise GangLost(f"{request.model!r} cannot be started; the server's log says why") from None
            except (RayActorError, RayTaskError, SprayError) as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                if not isinstance(cause, GangLost | RayActorError):
                    raise cause from None
                losses += 1
                logger.warning("request %s lost its ranks, time %d: %s", request.request_id, losses, cause)
                await asyncio.sleep(PAUSE_S)
        raise GangLost(f"{request.model!r} lost its ranks {ATTEMPTS} times over this request; it is not tried again")

    def _handle(self, model: str) -> DeploymentHandle[Any]:
        if model not in self._handles:
            try:
                handle: DeploymentHandle[Any] = serve.get_deployment_handle(GANG, app_name(model))
            except KeyError:
                raise GangLost(f"{model!r} is being deployed; try again in a moment") from None
            self._handles[model] = handle.options(stream=True)
        return self._handles[model]

    async def _watch(self) -> None:
        """Log what keeps a model from running, once per reason."""
        told: dict[str, str] = {}
        while True:
            try:
                for name, state in (await self.states()).items():
                    if state.reason and state.reason != told.get(name):
                        logger.warning("%s is %s: %s", name, state.state, state.reason)
                    told[name] = state.reason
            except Exception:
                logger.exception("the state of the cluster cannot be read")
            await asyncio.sleep(LOOK_PERIOD_S)


def _look() -> tuple[Any, list[Node], dict[str, float]]:
    """Serve's status, the nodes, and what is free on them in sum."""
    return serve.status(), alive_nodes(), free_resources()


def _reported(model: str) -> dict[str, Any]:
    queued, gangs = reports.of_application(app_name(model))
    return {"queued": queued, "gangs": gangs}


def _api_keys(variable: str | None) -> list[str] | None:
    if variable is None:
        return None
    keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if not keys:
        raise RuntimeError(f"auth.api_keys_env is {variable}, but the gateway's environment has no keys there")
    return keys
