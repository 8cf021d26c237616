"""Gateway: the hall behind the doors. A Serve deployment that knows the models and hands requests to their gangs.

Its model table comes as `user_config`, so that it changes without a restart. A request whose gang is lost runs again
on the next one: it was settled at admission, seed included, so the picture is the same.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deploy.spec import ModelSpec
from service.rest import rest_app
from workers.errors import GangLost, QueueFull, SprayError
from workers.messages import GenerationRequest, GenerationResult, StepEvent

logger = logging.getLogger("ray.serve")

ATTEMPTS = 3
"""How often one request may lose its ranks; one that brings them down each time is not worth a fourth."""

PAUSE_S = 0.7
"""Before another attempt, so that a lost gang is gone from the routing table."""

GANG = "Gang"
"""Name of the deployment inside each model's application."""


def app_name(model: str) -> str:
    """The Serve application of a model."""
    return f"model-{model}"


class Gateway:
    """One replica of the gateway.

    Args:
        instance_id: tells this deployment from another that may answer on the same port.
    """

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        self._models: dict[str, ModelSpec] = {}
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve at start and whenever the model table changes: `{"models": [ModelSpec as a dict]}`."""
        specs = [ModelSpec.model_validate(model) for model in user_config["models"]]
        self._models = {spec.name: spec for spec in specs}
        self._handles = {name: handle for name, handle in self._handles.items() if name in self._models}

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The REST door; Serve asks for it once this replica is constructed."""
        return rest_app(self)

    def models(self) -> dict[str, ModelSpec]:
        """The models of the deployment by name."""
        return self._models

    async def generate(self, request: GenerationRequest) -> AsyncIterator[StepEvent | GenerationResult]:
        """Run one request, on another gang if the first is lost.

        Raises:
            QueueFull: too many requests wait for the model.
            RequestError: the request does not suit the model.
            RequestFailed: it failed on a sound gang.
            GangLost: every gang it was given to was lost.
        """
        losses = 0
        while losses < ATTEMPTS:
            try:
                reports = self._handle(request.model).generate.remote(request)
                assert isinstance(reports, DeploymentResponseGenerator)
                async for report in reports:
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

    async def waiting_for(self) -> list[str]:
        """The models without a running gang."""
        applications = (await asyncio.to_thread(serve.status)).applications
        waiting = []
        for name in self._models:
            application = applications.get(app_name(name))
            deployment = application.deployments.get(GANG) if application else None
            states = deployment.replica_states if deployment else {}
            if "RUNNING" not in states:
                waiting.append(name)
        return waiting

    def _handle(self, model: str) -> DeploymentHandle[Any]:
        if model not in self._handles:
            handle: DeploymentHandle[Any] = serve.get_deployment_handle(GANG, app_name(model))
            self._handles[model] = handle.options(stream=True)
        return self._handles[model]
