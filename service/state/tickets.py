"""What is asked about a turn, by `service.routing` and the gateways, and what `service.state.turns` answers."""

from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Ticket:
    """A request that wants a turn.

    Attributes:
        request_id: the id of the request.
        caller: the caller, who shares the gangs with other callers.
        cost: the cost of the request, in a unit that all requests of the model share.
        place: when it was admitted, in seconds since the epoch, by the clock of its gateway.
        shape: width, height and frames, to prefer a warm gang.
        asker: the gateway that waits. When it is gone, its requests leave and its turns end.
        seconds: seconds of a whole gang that it will cost; 0: as many as a typical request.
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
    """What a request waits for, as far as is known.

    Attributes:
        ahead: the number of requests that are served before it.
        wait_s: seconds until its turn; 0 also if the cost of a request is not known.
    """

    ahead: int
    wait_s: float


class Takes(NamedTuple):
    """How long a request would take on a gang.

    Attributes:
        seconds: the estimate; 0: not known.
        least_s: the lower bound, in seconds; 0: not known.
    """

    seconds: float
    least_s: float
