"""A running Ray cluster as the place to deploy to: for `spray deploy`."""

import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from deploy.spec import SpecError
from service.rollout.changes import forget

ANSWERS_WITHIN_S = 10.0


@contextlib.contextmanager
def attach(address: str | None) -> Iterator[None]:
    """Be connected to a Ray cluster.

    Args:
        address: of the head: `host:port` of its GCS, `ray://host:port`, or None or `auto` for the one on this machine.

    Raises:
        SpecError: there is no cluster at this address.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    address = address or "auto"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if ":" in address and "://" not in address:
        options["_node_ip_address"] = _own_address(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **options)
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own, which ends this process at once
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpecError(
            f"no Ray cluster at {address!r}: {reason}; --address takes HOST:PORT of its head; `spray serve` prints it"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
        forget()


def _own_address(address: str) -> str:
    """This machine's address as seen from the head: Ray finds the node of a driver by it."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), ANSWERS_WITHIN_S) as probe:  # Ray would try for ever
            own: str = probe.getsockname()[0]
    except (OSError, ValueError, OverflowError) as error:
        raise SpecError(
            f"no Ray cluster at {address!r}: {error}; --address takes HOST:PORT of its head; `spray serve` prints it"
        ) from None
    return own
