"""Whether a port can be bound, for `spray doctor` and for local clusters, which say so before anything is started."""

import socket


def bind_error(host: str, port: int) -> str:
    """Why `host:port` cannot be bound, such as `Address already in use`; empty where it can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return ""
