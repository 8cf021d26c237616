"""What is known of one gang: its last report, and the turns that it was given since. `service.state.turns` keeps it.

The gang has the last word: it takes one request at a time, an elastic one several, and refuses more. What is believed
here may therefore be wrong without harm: it costs a refusal, and a pause.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from service.state.tickets import Ticket
from workers.gang.stats import GangBacklog

COMPARABLE_S = 2.0
"""Backlogs that differ by at most this count as equal: a cold shape costs about as much."""

REFUSED_S = 0.1
"""A gang that has refused a request is not asked again so soon."""

MOST_REFUSED_S = 1.0
"""The same for one that reports work; its report is up to this old."""

GangId = TypeVar("GangId")


class Given(NamedTuple):
    """A turn that has not ended: whose, and since when, in seconds since the epoch."""

    ticket: Ticket
    at: float


@dataclass
class GangState:
    """What is known of a gang beyond its report.

    Attributes:
        report: the last one.
        askers: the gateways that know the gang.
        turns: those that have it, by number; an elastic gang takes several requests at once.
        latest: the request that it was given last.
        freed_at: when it last became free, in seconds since the epoch.
        refused_at: when it last refused a request, in seconds since the epoch.
        lost_at: when a request lost its ranks there, in seconds since the epoch.
    """

    report: GangBacklog = field(default_factory=GangBacklog)
    askers: set[str] = field(default_factory=set)
    turns: dict[int, Given] = field(default_factory=dict)
    latest: Ticket | None = None
    freed_at: float = 0.0
    refused_at: float = 0.0
    lost_at: float = 0.0

    @property
    def full(self) -> bool:
        """It takes no further request."""
        return len(self.turns) >= self.report.slots

    @property
    def lost(self) -> bool:
        """It replaces its ranks."""
        return self.report.replacing or self.lost_at > self.report.reported_at

    def backlog_s(self, now: float) -> float:
        """Seconds until it is free of work that was not given from here, or is not known to have ended."""
        if self.freed_at >= self.report.reported_at and not self.turns:
            return 0.0
        return max(0.0, self.report.backlog_s - (now - self.report.reported_at))

    def pauses(self, now: float) -> bool:
        """It has refused a request lately, and is not asked again so soon; the later, the more work it reports."""
        return now - self.refused_at < max(REFUSED_S, min(MOST_REFUSED_S, self.backlog_s(now)))

    def remaining_s(self, now: float, request_s: float) -> float:
        """Seconds left of what it runs. `request_s`: what a request takes, for one that it has not reported yet."""
        fresh = [
            given for given in self.turns.values() if not (self.report.busy and self.report.reported_at > given.at)
        ]
        fresh_s = sum(max(0.0, (ticket.seconds or request_s) - (now - at)) for ticket, at in fresh)
        return fresh_s if fresh and len(fresh) == len(self.turns) else fresh_s + self.backlog_s(now)


def best(gangs: Sequence[GangId], backlogs: Mapping[GangId, float], warm: frozenset[GangId]) -> GangId:
    """The gang for a request: a warm one of those within `COMPARABLE_S` of the least backlog, if there is one.

    Equals keep their order: shuffle them first, so that two gateways do not rush to the same one.

    Args:
        gangs: those that may be asked; at least one.
        backlogs: seconds until each is free.
        warm: those that have run the request's shape.
    """
    least_s = min(backlogs[gang] for gang in gangs)
    comparable = [gang for gang in gangs if backlogs[gang] <= least_s + COMPARABLE_S]
    return min(comparable, key=lambda gang: (gang not in warm, backlogs[gang]))
