"""Elastic gangs against fixed degrees: which share of requests is in time.

    python -m tests.benchmarks.elastic --simulate [--loads 0.1 0.3 ...] [--hours 8] [--seed 1] [--json FILE]
    python -m tests.benchmarks.elastic --live [--seconds 60] [--seed 1] [--pairs 15]

`--live` is `tests.benchmarks.elastic_live`: real gangs of two ranks on this machine. `--simulate` is one node of 8
ranks, step by step: pictures of 30 steps of 0.25 s, clips of 40 steps of 8 s, each on one rank; on 2, 4 and 8 ranks
with 0.90, 0.80 and 0.65 of the ideal speed. A request is in time within three times what it takes alone on 8 ranks, a
picture with a second more. `fixed K` is gangs of K ranks that take the earliest deadline first; `elastic` asks
`workers.gang.dealer`, as a gang does. Loads are shares of what 8 gangs of one rank could do.
"""

import argparse
import heapq
import itertools
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from workers.gang.dealer import Block, Work, deal

RANKS = 8
EFFICIENCY = {1: 1.0, 2: 0.90, 4: 0.80, 8: 0.65}
DEGREES = tuple(EFFICIENCY)
CHANGE_S = 0.02
"""What taking other ranks costs a request, on top of its next step."""

MIXES = {"5% videos": 0.05, "30% videos": 0.3, "50% videos": 0.5}
LOADS = (0.1, 0.3, 0.5, 0.7, 0.85, 0.9)


class Kind(NamedTuple):
    """One kind of request: its steps, what one takes on one rank, and what is added to its deadline."""

    name: str
    steps: int
    step_s: float
    grace_s: float
    most: int

    def step_at(self, degree: int) -> float:
        """Seconds of a step."""
        return self.step_s / (degree * EFFICIENCY[degree])

    @property
    def deadline_s(self) -> float:
        """Seconds from its arrival."""
        return 3 * self.steps * self.step_at(RANKS) + self.grace_s


IMAGE, VIDEO = Kind("image", 30, 0.25, 1.0, most=4), Kind("video", 40, 8.0, 0.0, most=8)


class Request(NamedTuple):
    """One that arrives."""

    id: str
    arrived: float
    kind: Kind

    @property
    def due(self) -> float:
        """When it should be done."""
        return self.arrived + self.kind.deadline_s


class Done(NamedTuple):
    """One that has ended."""

    kind: Kind
    took_s: float
    in_time: bool


@dataclass(frozen=True)
class Row:
    """What one policy makes of one load."""

    load: float
    mix: str
    policy: str
    in_time: float
    image_in_time: float
    video_in_time: float
    image_p50_s: float
    image_p95_s: float
    video_p50_s: float
    video_p95_s: float
    longest_s: float


def arrivals(load: float, videos: float, seconds: float, seed: int) -> list[Request]:
    """Requests at random moments, so many that they would keep this share of the ranks at work, one rank each."""
    draw, now, found = random.Random(seed), 0.0, []
    mean_s = sum(share * kind.steps * kind.step_s for share, kind in ((1 - videos, IMAGE), (videos, VIDEO)))
    while True:
        now += draw.expovariate(load * RANKS / mean_s)
        if now > seconds:
            return found
        found.append(Request(str(len(found)), now, VIDEO if draw.random() < videos else IMAGE))


def fixed(requests: list[Request], degree: int) -> Iterator[Done]:
    """Gangs of one degree, each with one request at a time; the earliest deadline first."""
    free, coming = RANKS // degree, iter([*requests, None])
    queue: list[tuple[float, int, Request]] = []
    running: list[tuple[float, int, Request]] = []
    order, following = itertools.count(), next(coming)
    while following or queue or running:
        if following and (not running or following.arrived <= running[0][0]):
            now = following.arrived
            heapq.heappush(queue, (following.due, next(order), following))
            following = next(coming)
        else:
            now, _, ended = heapq.heappop(running)
            free += 1
            yield Done(ended.kind, now - ended.arrived, now <= ended.due)
        while free and queue:
            _, _, begun = heapq.heappop(queue)
            free -= 1
            ends = now + begun.kind.steps * begun.kind.step_at(degree)
            heapq.heappush(running, (ends, next(order), begun))


def elastic(requests: list[Request]) -> Iterator[Done]:
    """One gang; the dealer is asked at every boundary."""
    coming, order = iter([*requests, None]), itertools.count()
    waiting: dict[str, Work] = {}
    running: list[tuple[float, int, Work]] = []
    known = {request.id: request for request in requests}
    following = next(coming)
    while following or waiting or running:
        if following and (not running or following.arrived <= running[0][0]):
            now = following.arrived
            waiting[following.id] = _work(following)
            following = next(coming)
        else:
            now = running[0][0]
        while running and running[0][0] <= now:
            _, _, work = heapq.heappop(running)
            if work.steps_left > 1:
                waiting[work.id] = replace(work, steps_left=work.steps_left - 1, stood_since=now)
            else:
                request = known[work.id]
                yield Done(request.kind, now - request.arrived, now <= request.due)
        if not waiting or sum(work.at.size for _, _, work in running if work.at) == RANKS:
            continue
        for name, block in deal(list(waiting.values()), [work for _, _, work in running], RANKS, now).items():
            work = waiting.pop(name)
            change_s = 0.0 if work.at in (None, block) else work.change_s
            ends = now + change_s + work.step_s[block.size]
            began = replace(work, at=Block(*block), stood_since=now + change_s)
            heapq.heappush(running, (ends, next(order), began))
        # A request that was not dealt in has given its ranks away.
        waiting.update({name: replace(work, at=None) for name, work in waiting.items() if work.at})


def _work(request: Request) -> Work:
    kind = request.kind
    return Work(
        id=request.id,
        arrived=request.arrived,
        steps_left=kind.steps,
        step_s={degree: kind.step_at(degree) for degree in DEGREES if degree <= kind.most},
        due=request.due,
        stood_since=request.arrived,
        change_s=CHANGE_S,
    )


def row(load: float, mix: str, policy: str, ended: list[Done]) -> Row:
    """The figures of one run."""

    def share(*kinds: Kind) -> float:
        found = [done.in_time for done in ended if done.kind in kinds]
        return sum(found) / len(found) if found else 1.0

    def quantile(kind: Kind, q: float) -> float:
        found = sorted(done.took_s for done in ended if done.kind is kind)
        return found[int(q * len(found))] if found else 0.0

    return Row(
        load,
        mix,
        policy,
        share(IMAGE, VIDEO),
        share(IMAGE),
        share(VIDEO),
        quantile(IMAGE, 0.5),
        quantile(IMAGE, 0.95),
        quantile(VIDEO, 0.5),
        quantile(VIDEO, 0.95),
        max(done.took_s for done in ended),
    )


def simulate(loads: tuple[float, ...], hours: float, seed: int) -> Iterator[Row]:
    """A row for each load, mix and policy, as it is known."""
    for mix, videos in MIXES.items():
        for load in loads:
            requests = arrivals(load, videos, hours * 3600, seed)
            for degree in DEGREES:
                yield row(load, mix, f"fixed {degree}", list(fixed(requests, degree)))
            yield row(load, mix, "elastic", list(elastic(requests)))


HEAD = "| load | mix | policy | in time | images | videos | images p50 s | p95 s | videos p50 s | p95 s | longest s |"


def line(found: Row) -> str:
    """A row of the table."""
    shares = f"{found.in_time:.2f} | {found.image_in_time:.2f} | {found.video_in_time:.2f}"
    times = (found.image_p50_s, found.image_p95_s, found.video_p50_s, found.video_p95_s, found.longest_s)
    seconds = " | ".join(f"{each:.1f}" for each in times)
    return f"| {found.load} | {found.mix} | {found.policy} | {shares} | {seconds} |"


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--simulate", action="store_true")
    what.add_argument("--live", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic for each policy, with --live")
    parser.add_argument("--pairs", type=int, default=15, help="of requests for the overhead, with --live")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.live:
        from tests.benchmarks import elastic_live  # here: it brings Ray and torch

        elastic_live.measure(arguments.seconds, arguments.seed, arguments.pairs)
        return 0
    rows = []
    print(HEAD)
    print("|---" * 11 + "|", flush=True)
    for found in simulate(tuple(arguments.loads), arguments.hours, arguments.seed):
        rows.append(found)
        print(line(found), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(each) for each in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
