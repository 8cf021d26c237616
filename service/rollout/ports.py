"""Why a port cannot be bound, and who can reach it: for `spray doctor`, `spray serve` and `spray deploy`."""

import socket

from deploy.gateway_spec import is_loopback
from deploy.spec import DeploymentSpec


def bind_error(host: str, port: int) -> str:
    """Why `host:port` cannot be bound, such as `Address already in use`; empty if it can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers bind, and without SO_REUSEPORT: Serve sets that, and two clusters could share a port unnoticed.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def open_to_all(spec: DeploymentSpec) -> str:
    """A warning if anyone who reaches the HTTP port may use it; empty if callers need a key or are on this machine."""
    if spec.auth.needs_key or is_loopback(spec.gateway.host):
        return ""
    return (
        f"warning: anybody who reaches {spec.gateway.host}:{spec.gateway.port} may use this deployment; "
        "auth.api_keys_env asks for keys"
    )
