"""Why a port cannot be bound: for `spray doctor`, and for local clusters, which find out before they start anything."""

import socket


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
