"""What is asked about a turn, by `service.routing` and the gateways, and what `service.state.turns` answers."""

from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Ticket:
    """A request that wants a turn.

    Attributes:
        request_id: of the request.
        caller: who shares with other callers.
        cost: of the request, in any unit that all requests of the model have in common.
        place: when it was admitted, in seconds since the epoch, by the clock of its gateway.
        shape: width, height and frames, for gangs that are warm.
        asker: the gateway that waits; what it holds is taken back when it is gone.
        seconds: of a whole gang that it will cost; 0: as much as a typical one.
    """

    request_id: str
    caller: str
    cost: float
    place: float
    shape: Shape
    asker: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Turn:
    """A gang, given to a request until `Turns.end`."""

    number: int
    gang: str


class Prospect(NamedTuple):
    """What a request has to wait for, as far as is known.

    Attributes:
        ahead: requests that are served before it.
        wait_s: seconds until its turn; 0 also while nobody knows what a request costs.
    """

    ahead: int
    wait_s: float


class Takes(NamedTuple):
    """What a request would take on a gang.

    Attributes:
        seconds: as an estimate; 0: nobody knows.
        least_s: at the very least; 0: nobody knows.
    """

    seconds: float
    least_s: float
