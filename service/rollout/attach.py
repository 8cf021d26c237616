"""Connects to a running Ray cluster, for `spray deploy`."""

import contextlib
import socket
from collections.abc import Iterator

from ray.exceptions import RayError

from deploy.spec import SpecError
from service.rollout.serve_client import connect, disconnect

ANSWERS_WITHIN_S = 10.0


@contextlib.contextmanager
def attach(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster while the context lasts.

    Args:
        address: of the head: `host:port` of its GCS, `ray://host:port`, or None or `auto` for the one on this machine.

    Raises:
        SpecError: there is no cluster at this address, or it does not let this machine in.
    """
    address = address or "auto"
    own = _own_address(address) if ":" in address and "://" not in address else None
    try:
        connect(address, own)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise _not_there(address, str(error).strip().partition("\n")[0] or type(error).__name__) from None
    try:
        yield
    finally:
        disconnect()


def _own_address(address: str) -> str:
    """This machine's address as the head sees it; Ray finds the node of a driver by it."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), ANSWERS_WITHIN_S) as probe:  # Ray would try forever
            own: str = probe.getsockname()[0]
    except (OSError, ValueError, OverflowError) as error:
        raise _not_there(address, str(error)) from None
    return own


def _not_there(address: str, reason: str) -> SpecError:
    return SpecError(
        f"no Ray cluster at {address!r}: {reason}; --address takes HOST:PORT of its head, as `spray serve` prints it; "
        "one that asks for a token needs it in RAY_AUTH_TOKEN"
    )
