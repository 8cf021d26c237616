"""Replica-hours and waits of a fleet over days of traffic: our autoscaling and routing against Ray Serve's own.

    python -m tests.benchmarks.fleet_sim [--quick] [--processes N]

Four models, 100 gangs at most. Both policies are tuned per model by grid, on the same training days. Serve's gets the
setting with the fewest replica-hours whose p95 wait keeps the model's goal. Ours gets the setting with the shortest
p95 wait that still saves `SAVED` of those hours; if none does, the cheapest that keeps the goal. Its two constants were
chosen on these days too. Both are then judged on days that neither has seen, some of another shape of traffic. Beside
it stands what Serve could do at best: of all settings on its frontier the cheapest that reaches our p95 on that very
day, chosen in hindsight. Tables as markdown to stdout.
"""

import argparse
import itertools
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from tests.benchmarks.fleet import Control, Fleet, Outcome
from tests.benchmarks.fleet_traffic import LOADS, Kind, Load, day

TRAINING: tuple[tuple[int, Kind], ...] = ((1, "diurnal"), (2, "diurnal"))
EVALUATION: tuple[tuple[int, Kind], ...] = (
    (11, "diurnal"), (12, "diurnal"), (13, "diurnal"), (21, "office"), (22, "office"),
)  # fmt: skip
SAVED = 0.1
"""Share of Serve's replica-hours that ours has to save on the training days; what else it could save buys speed."""

DOWNSCALE_DELAYS = (60.0, 300.0, 600.0)
TO_ZERO_DELAYS = (600.0, 900.0, 1800.0)

ONGOING = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)
"""Serve's target: ongoing requests per gang. Gangs take one at a time, so more than 1 means that some wait."""

PACES = ((0.0, 30.0), (30.0, 30.0), (0.0, 90.0))
"""Serve's upscale_delay_s and look_back_period_s"""

BACKLOGS = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0)
"""Our target_backlog_seconds, as a share of the wait that is the model's goal."""

OURS_UPSCALE_S, OURS_LOOK_BACK_S = 5.0, 20.0
"""What a deployment has unless it says otherwise."""


@dataclass(frozen=True)
class Point:
    """One setting of a policy and what it came to on the training days."""

    control: Control
    hours: float
    p95_s: float


@dataclass(frozen=True)
class Tuned:
    """One model: the setting of ours, that of Serve, and all that are worth a look."""

    load: Load
    ours: Point
    serve: Point
    our_frontier: list[Point]
    serve_frontier: list[Point]


@dataclass(frozen=True)
class Verdict:
    """One model on one unseen day: ours, Serve as tuned, Serve as best in hindsight (None: no setting reaches ours)."""

    load: Load
    trace: tuple[int, Kind]
    ours: Outcome
    serve: Outcome
    hindsight: Outcome | None

    @property
    def bar(self) -> str:
        """Whether ours used fewer replica-hours at an equal or better p95."""
        fewer = self.ours.replica_hours < self.serve.replica_hours
        if fewer and self.ours.wait_s(0.95) <= self.serve.wait_s(0.95):
            return "met"
        if self.hindsight is not None and self.ours.replica_hours < self.hindsight.replica_hours:
            return "met against hindsight"
        return "not met"


def main() -> None:
    """Tune, judge, print."""
    parser = argparse.ArgumentParser(description="A fleet of gangs, simulated.")
    parser.add_argument("--quick", action="store_true", help="coarse grids, one day of each kind")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    training, evaluation = (TRAINING[:1], EVALUATION[2:4]) if arguments.quick else (TRAINING, EVALUATION)
    with ProcessPoolExecutor(arguments.processes) as pool:
        tuned = [tune(load, training, pool, every=7 if arguments.quick else 1) for load in LOADS]
        tasks = [(each, trace) for each in tuned for trace in evaluation]
        verdicts = list(pool.map(judge, *zip(*tasks, strict=True)))
    print_verdicts(verdicts)
    print_settings(tuned)


def tune(load: Load, training: tuple[tuple[int, Kind], ...], pool: ProcessPoolExecutor, every: int) -> Tuned:
    """The setting of each policy for one model."""
    frontiers = []
    for settings in (serve_grid(load), our_grid(load)):
        tried = list(settings)[::every]
        count = len(tried)
        frontiers.append(frontier(pool.map(point, [load] * count, tried, [training] * count)))
    serves, ours = frontiers
    serve = cheapest(serves, load.goal_s)
    saving = [p for p in ours if p.hours <= (1 - SAVED) * serve.hours]
    best = min(saving, key=lambda p: p.p95_s, default=None)
    if best is None or best.p95_s > serve.p95_s:
        best = cheapest(ours, load.goal_s)
    return Tuned(load, best, serve, ours, serves)


def our_grid(load: Load) -> Iterable[Control]:
    """All settings of our policy that are tried for a model."""
    for backlog, (downscale_s, to_zero_s) in itertools.product(BACKLOGS, downscales(load)):
        yield Control(True, OURS_LOOK_BACK_S, OURS_UPSCALE_S, downscale_s, to_zero_s, backlog * load.goal_s)


def serve_grid(load: Load) -> Iterable[Control]:
    """All settings of Serve's policy that are tried for a model."""
    for ongoing, (upscale_s, look_back_s), delays in itertools.product(ONGOING, PACES, downscales(load)):
        yield Control(False, look_back_s, upscale_s, *delays, ongoing)


def downscales(load: Load) -> list[tuple[float, float]]:
    """downscale_delay_s and downscale_to_zero_delay_s; the latter matters only where a model may sleep."""
    if load.min_replicas:
        return [(delay_s, delay_s) for delay_s in DOWNSCALE_DELAYS]
    return list(itertools.product(DOWNSCALE_DELAYS, TO_ZERO_DELAYS))


def frontier(points: Iterable[Point]) -> list[Point]:
    """The settings that no other one beats in both respects, the cheapest first."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (p.hours, p.p95_s)):
        if not best or p.p95_s < best[-1].p95_s:
            best.append(p)
    return best


def cheapest(points: list[Point], goal_s: float) -> Point:
    """Of a frontier the first that keeps the goal; the fastest if none does."""
    return next((p for p in points if p.p95_s <= goal_s), points[-1])


def judge(tuned: Tuned, trace: tuple[int, Kind]) -> Verdict:
    """One unseen day of one model."""
    mine = run(tuned.load, tuned.ours.control, trace)
    theirs = {p: run(tuned.load, p.control, trace) for p in tuned.serve_frontier}
    as_good = [outcome for outcome in theirs.values() if outcome.wait_s(0.95) <= mine.wait_s(0.95)]
    hindsight = min(as_good, key=lambda outcome: outcome.replica_hours, default=None)
    return Verdict(tuned.load, trace, mine, theirs[tuned.serve], hindsight)


def run(load: Load, control: Control, trace: tuple[int, Kind]) -> Outcome:
    """One day."""
    return Fleet(load, day(load, *trace), control).run()


def point(load: Load, control: Control, traces: Iterable[tuple[int, Kind]]) -> Point:
    """One setting on the training days."""
    outcome = pooled([run(load, control, trace) for trace in traces])
    return Point(control, outcome.replica_hours, outcome.wait_s(0.95))


def pooled(outcomes: list[Outcome]) -> Outcome:
    """Several days or models as one: the waits of all requests, the sums of hours."""
    return Outcome(
        waits_s=[wait for outcome in outcomes for wait in outcome.waits_s],
        gang_s=sum(outcome.gang_s for outcome in outcomes),
        busy_s=sum(outcome.busy_s for outcome in outcomes),
    )


def print_verdicts(verdicts: list[Verdict]) -> None:
    """One line per model and unseen day, and one per model for all days."""
    print(
        "| model, day | ours: hours | util. | p50 s | p95 s | Serve: hours | util. | p50 s | p95 s | hindsight | bar |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for verdict in verdicts:
        best = f"{verdict.hindsight.replica_hours:.0f}" if verdict.hindsight else "none reaches it"
        name = f"{verdict.load.name}, {verdict.trace[1]} {verdict.trace[0]}"
        print(f"| {name} | {cells(verdict.ours)} | {cells(verdict.serve)} | {best} | {verdict.bar} |")
    for name in dict.fromkeys(verdict.load.name for verdict in verdicts):
        some = [verdict for verdict in verdicts if verdict.load.name == name]
        print_sum(f"{name}, all days", some)
    print_sum("all models, all days", verdicts)


def print_sum(name: str, verdicts: list[Verdict]) -> None:
    """Several lines as one."""
    sides = [pooled([v.ours for v in verdicts]), pooled([v.serve for v in verdicts])]
    change = sides[0].gang_s / sides[1].gang_s - 1
    met = sum(verdict.bar == "met" for verdict in verdicts)
    print(
        f"| **{name}** | {cells(sides[0])} | {cells(sides[1])} | {change:+.0%} hours | {met} of {len(verdicts)} met |"
    )


def cells(outcome: Outcome) -> str:
    """Hours, utilisation, median and p95 wait."""
    waits = f"{outcome.wait_s(0.5):.1f} | {outcome.wait_s(0.95):.1f}"
    return f"{outcome.replica_hours:.0f} | {outcome.busy_s / outcome.gang_s:.0%} | {waits}"


def print_settings(tuned: list[Tuned]) -> None:
    """What each policy can trade on the training days, the chosen settings marked."""
    print("\nThe frontiers of both policies on the training days; * is the chosen setting.\n")
    print("| model, policy | hours | p95 s | target | upscale s | downscale s | to zero s | look-back s |")
    print("|---|---|---|---|---|---|---|---|")
    for each in tuned:
        print_frontier(f"{each.load.name}, ours", each.our_frontier, each.ours)
        print_frontier(f"{each.load.name}, Serve", each.serve_frontier, each.serve)


def print_frontier(name: str, points: list[Point], chosen: Point) -> None:
    """One line per setting."""
    for p in points:
        c, mark = p.control, " *" if p == chosen else ""
        delays = f"{c.upscale_delay_s:.0f} | {c.downscale_delay_s:.0f} | {c.downscale_to_zero_delay_s:.0f}"
        print(f"| {name}{mark} | {p.hours:.0f} | {p.p95_s:.1f} | {c.target:g} | {delays} | {c.look_back_s:.0f} |")


if __name__ == "__main__":
    main()
