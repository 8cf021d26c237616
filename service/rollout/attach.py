"""Connects to a running Ray cluster, for `spray deploy`."""

import contextlib
import socket
import traceback
from collections.abc import Iterator

from ray.exceptions import RayError, RayTaskError

from deploy.spec import SpecError
from service.rollout.serve_client import connect, disconnect

ANSWERS_WITHIN_S = 10.0


@contextlib.contextmanager
def attach(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster while the context lasts.

    Args:
        address: of the head: `host:port` of its GCS, `ray://host:port`, or None or `auto` for the one on this machine.

    Raises:
        SpecError: there is no cluster at this address, it does not let this machine in, or it has gone since.
    """
    address = address or "auto"
    own = _own_address(address) if ":" in address and "://" not in address else None
    try:
        connect(address, own)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise _not_there(address, _first_line(error)) from None
    try:
        yield
    except (RayTaskError, BrokenPipeError):  # an answer, if a bad one; the reader of our output has gone
        raise
    except (ConnectionError, RayError, RuntimeError) as error:
        if not isinstance(error, ConnectionError | RayError) and not _raised_by_ray(error):
            raise  # a fault of ours, which needs its traceback
        raise SpecError(
            f"the Ray cluster at {address!r} no longer answers: {_first_line(error)}; where it still runs, it goes on "
            "with what it was told; look with `spray ps`"
        ) from None
    finally:
        disconnect()


def _raised_by_ray(error: Exception) -> bool:
    """Whether Ray's own code has raised it. Ray has no class of its own for a lost connection."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__"))
    return module.partition(".")[0] == "ray"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


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
