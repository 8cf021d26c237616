"""What Serve's gRPC proxies offer, listen at and take in. The deployment's config names `SERVICES`.

Serve lets its gRPC port listen on all interfaces, whatever the host of HTTP is, takes messages of 2 GiB, and answers
with Ray's own words when a gateway has died. None of this has a public option, so `prepare` replaces it in each proxy
before it listens; `service.edge` calls it there.
"""

from typing import Any

import grpc

from service.api.errors import GATEWAY_GONE, GATEWAY_LOST, RETRY_AFTER_S
from service.names import GATEWAY_APP
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.rpc.statuses import metadata, set_status

SERVICES = (
    "service.proto.mediagen.v1.generation_service_pb2_grpc.add_MediaGenerationServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
"""What adds each service to a server. Serve adds reflection, which lists these, and its own."""

MOST_RECEIVED_BYTES = 64 << 20
"""Of one message, in a proxy. The gateway then applies `limits.max_body_bytes`, which a proxy does not know."""

MOST_SENT_BYTES = 512 << 20
"""Of one message. Only `GenerateImage` answers with more than 2 MiB."""

PING_S = 10
"""Clients may ask this often whether the server is there while it has nothing to say, as in a long decode."""

CONNECTION_S = 300
"""After which a client makes a new connection, while calls on the old one go on to their end. Else all its calls would
go to one node, or to the old of two clusters, for as long as that lives."""

CALL_S = 86_400
"""After which a call ends at the latest, once its connection is older than `CONNECTION_S`: the longest deadline, which
is longer than any watch. Without it, a caller that stops in the middle of a message would be kept forever."""

MOST_CALLS = 100
"""At once by one connection; further ones wait. Each may take `MOST_RECEIVED_BYTES` before its key is known."""

OPTIONS = [
    ("grpc.max_receive_message_length", MOST_RECEIVED_BYTES),
    ("grpc.max_send_message_length", MOST_SENT_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", PING_S * 1000),
    ("grpc.max_connection_age_ms", CONNECTION_S * 1000),
    ("grpc.max_connection_age_grace_ms", CALL_S * 1000),
    ("grpc.max_concurrent_streams", MOST_CALLS),
]


APPLICATION = "application"
"""The metadata by which a client names one of Serve's applications. It decides where there are several."""

OF_A_LOST_GATEWAY = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND)
"""What Serve says by itself where no gateway answers: it died, it cannot start, it is not deployed yet."""


def prepare() -> None:
    """Let the gRPC server of the proxy in this process listen at the host of HTTP, bound its messages, name its errors.

    A proxy starts HTTP right before gRPC, and asks then whether its host is an IPv6 address. Only there the host is
    seen: the proxy's class comes by value, with the functions that it has looked up before.

    Raises:
        RuntimeError: Serve has changed, and the port would be open to other machines.
    """
    from ray.serve._private import default_impl, grpc_util, http_util, proxy  # here: only proxies use them

    binds: Any = default_impl
    serves: Any = grpc_util
    asks: Any = http_util
    ends: Any = proxy
    replaced = (
        (binds, "add_grpc_address"),
        (serves, "DEFAULT_GRPC_SERVER_OPTIONS"),
        (asks, "is_ipv6"),
        (ends, "set_grpc_code_and_details"),
    )
    if not all(hasattr(*each) for each in replaced):
        raise RuntimeError("this version of Ray opens the gRPC port of a proxy in another way; see service.rpc.proxy")
    serves.DEFAULT_GRPC_SERVER_OPTIONS = OPTIONS
    binds.add_grpc_address = _add_nowhere
    is_ipv6 = asks.is_ipv6

    def is_ipv6_seen(host: str) -> Any:
        binds.add_grpc_address = lambda server, address: server.add_insecure_port(at(host, address))
        return is_ipv6(host)

    asks.is_ipv6 = is_ipv6_seen
    set_as_serve_does = ends.set_grpc_code_and_details

    def set_in_our_words(context: Any, status: Any) -> None:
        named = metadata(context).get(APPLICATION, GATEWAY_APP)
        if context.code() or status.code not in OF_A_LOST_GATEWAY:
            set_as_serve_does(context, status)
        elif status.code is grpc.StatusCode.NOT_FOUND and named != GATEWAY_APP:
            text = f"the metadata {APPLICATION!r} is {named[:60]!r}, which is not here; send {GATEWAY_APP!r}, or none"
            set_status(context, "NOT_FOUND", pb.JobError(code="application_not_found", message=text), None)
        else:
            set_status(context, "UNAVAILABLE", pb.JobError(code=GATEWAY_LOST, message=GATEWAY_GONE), RETRY_AFTER_S)

    ends.set_grpc_code_and_details = set_in_our_words


def _add_nowhere(server: Any, address: str) -> None:
    raise RuntimeError("the host of HTTP is not known, at which gRPC should listen; see service.rpc.proxy")


def at(host: str, address: str) -> str:
    """The address on this host instead of on all interfaces."""
    port = address.rpartition(":")[2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
