"""The requests of this process that wait for a gang. The gateway enters them; the router that places them takes them
out.

A module of its own, because Serve copies the module of a request router into the process that routes.
"""

from typing import NamedTuple


class Place(NamedTuple):
    """The place of a waiting request.

    Attributes:
        admitted_at: seconds since the epoch.
        caller: its caller; callers take turns, see `service.state.turns`.
        of_job: nobody holds a connection for it, so it takes no place from those who do.
    """

    admitted_at: float
    caller: str = ""
    of_job: bool = False


class Waiting:
    """The requests of one model. Each has a place, which it keeps when it loses its gang and waits again."""

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def callers(self) -> int:
        """How many of them somebody waits for; the others are those of jobs."""
        return sum(not place.of_job for place in list(self._places.values()))  # Serve's router has its own thread

    def enter(self, request_id: str, place: Place) -> None:
        """Enter a request."""
        self._places[request_id] = place

    def leave(self, request_id: str) -> None:
        """Take a request out: a gang took it, or its caller left."""
        self._places.pop(request_id, None)

    def place(self, request_id: str) -> Place | None:
        """The place of a waiting request; None if it does not wait."""
        return self._places.get(request_id)


_waiting: dict[str, Waiting] = {}


def waiting_for(application: str) -> Waiting:
    """The requests that wait for an application's gangs."""
    return _waiting.setdefault(application, Waiting())
