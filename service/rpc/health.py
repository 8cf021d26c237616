"""grpc.health.v1 of a gateway: `Check` once, `Watch` whenever it changes. For `service.rpc.methods`.

The service `""` is the server, under the rule of `/readyz`; the name of a model is that model. No key is needed.
"""

import asyncio
from collections.abc import AsyncGenerator

from grpc_health.v1.health_pb2 import HealthCheckResponse

from service.api.backend import Backend
from service.api.cluster import TAKES_REQUESTS, readiness
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from workers.errors import ModelNotFound

SERVER = ("", pb.DESCRIPTOR.services_by_name["MediaGenerationService"].full_name)

LOOK_S = 0.5

LONGEST_S = 3600.0
"""Of one call of `Watch`: nobody can tell a client that has forgotten its call from one that waits."""

MOST_WATCHERS, MOST_OF_ONE = 100, 25
"""The most calls of `Watch` of one gateway, so that they leave its slots to requests: of all clients, and of one
address, since no key is needed."""

SERVING: int = HealthCheckResponse.SERVING
NOT_SERVING: int = HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN: int = HealthCheckResponse.SERVICE_UNKNOWN


def status_of(backend: Backend, service: str) -> int:
    """The status of the server, or of a model."""
    if service in SERVER:
        return SERVING if readiness(backend)[0] == "ok" else NOT_SERVING
    if service not in backend.models():
        return SERVICE_UNKNOWN
    state = backend.states().get(service)
    serves = state is not None and state.state in TAKES_REQUESTS and not backend.draining
    return SERVING if serves else NOT_SERVING


def check(backend: Backend, service: str) -> HealthCheckResponse:
    """The answer of `Check`.

    Raises:
        ModelNotFound: there is no such service.
    """
    status = status_of(backend, service)
    if status == SERVICE_UNKNOWN:
        raise ModelNotFound(f"no service {service!r}; known are '' and {', '.join(backend.models())}")
    return HealthCheckResponse(status=status)


async def watch(backend: Backend, service: str) -> AsyncGenerator[HealthCheckResponse]:
    """The status now, and each change of it, until the client leaves, the gateway drains, or `LONGEST_S` are over.

    A client that still wants to know calls again, and may reach another gateway.
    """
    clock = asyncio.get_running_loop().time
    told, until = None, clock() + LONGEST_S
    while clock() < until:
        drains = backend.draining  # before the status is looked up: the last one told is that of a gateway that drains
        status = status_of(backend, service)
        if status != told:
            told = status
            yield HealthCheckResponse(status=status)
        if drains:
            return
        await asyncio.sleep(LOOK_S)
