"""What is known of one gang: its last report, and the turns that it was given since. Kept by `service.state.turns`.

The gang has the last word: it takes one request at a time (an elastic gang several) and refuses more. So a wrong belief
here does no harm: it costs a refusal and a pause.

Moments are seconds of this process's monotonic clock: a clock that is set back keeps no gang out. A report has the time
of the gang's clock, and counts from the moment when it is first heard, less its age.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from service.state.tickets import Ticket
from workers.gang.stats import GangBacklog

COMPARABLE_S = 2.0
"""Backlogs that differ by at most this many seconds count as equal: a cold shape costs about as much."""

REFUSED_S = 0.1
"""Seconds before a gang that has refused a request is asked again."""

MOST_REFUSED_S = 1.0
"""The most seconds, for a gang that reports work: its report is up to this old."""

MOST_AGE_S = 5.0
"""The most seconds that a report is older than the moment when it is first heard; more is a clock that is wrong."""

GangId = TypeVar("GangId")


class Given(NamedTuple):
    """A turn that has not ended: its request, and when it was given."""

    ticket: Ticket
    at: float


@dataclass
class GangState:
    """What is known of a gang.

    Attributes:
        report: its last report.
        reported_at: when it was made.
        askers: the gateways that know the gang, with the gang's own time of the last report that each has told.
        turns: its turns that have not ended, by number. An elastic gang takes several requests at once.
        latest: the request that it was given last.
        freed_at: when it last became free.
        refused_at: when it last refused a request.
        lost_at: when a request lost its ranks there.
    """

    report: GangBacklog = field(default_factory=GangBacklog)
    reported_at: float = -math.inf
    askers: dict[str, float] = field(default_factory=dict)
    turns: dict[int, Given] = field(default_factory=dict)
    latest: Ticket | None = None
    freed_at: float = -math.inf
    refused_at: float = -math.inf
    lost_at: float = -math.inf

    def hear(self, asker: str, report: GangBacklog) -> None:
        """Take what a gateway has last heard of the gang. Gateways do not hear the same at the same moment."""
        told_at = self.askers.get(asker)
        self.askers[asker] = report.reported_at
        if report.reported_at == told_at:
            return
        set_back = told_at is not None and 0 < report.reported_at < told_at  # the gang's clock: its next is this one
        if report.reported_at > self.report.reported_at or set_back:
            age_s = time.time() - report.reported_at
            self.report, self.reported_at = report, time.monotonic() - min(max(0.0, age_s), MOST_AGE_S)

    @property
    def full(self) -> bool:
        """Whether it takes no further request."""
        return len(self.turns) >= self.report.slots

    @property
    def lost(self) -> bool:
        """Whether it is replacing its ranks."""
        return self.report.replacing or self.lost_at > self.reported_at

    def backlog_s(self, now: float) -> float:
        """Seconds of reported work that is left: given elsewhere, or not known to have ended."""
        if self.freed_at >= self.reported_at and not self.turns:
            return 0.0
        return max(0.0, self.report.backlog_s - (now - self.reported_at))

    def pauses(self, now: float) -> bool:
        """Whether it has refused a request so lately that it is not asked again. More reported work, longer pause."""
        return now - self.refused_at < max(REFUSED_S, min(MOST_REFUSED_S, self.backlog_s(now)))

    def remaining_s(self, now: float, request_s: float) -> float:
        """Seconds of work that are left. `request_s` is assumed for requests that it has not reported yet."""
        fresh = [given for given in self.turns.values() if not (self.report.busy and self.reported_at > given.at)]
        fresh_s = sum(max(0.0, (ticket.seconds or request_s) - (now - at)) for ticket, at in fresh)
        return fresh_s if fresh and len(fresh) == len(self.turns) else fresh_s + self.backlog_s(now)


def best(gangs: Sequence[GangId], backlogs: Mapping[GangId, float], warm: frozenset[GangId]) -> GangId:
    """The gang for a request: among gangs within `COMPARABLE_S` of the least backlog, a warm one if possible.

    Equal gangs keep their order: shuffle them first, so that two gateways do not rush to the same one.

    Args:
        gangs: the candidates; at least one.
        backlogs: seconds until each is free.
        warm: the gangs that have run the request's shape.
    """
    least_s = min(backlogs[gang] for gang in gangs)
    comparable = [gang for gang in gangs if backlogs[gang] <= least_s + COMPARABLE_S]
    return min(comparable, key=lambda gang: (gang not in warm, backlogs[gang]))
