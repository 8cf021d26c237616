"""Replica-hours and waits of a fleet over days of traffic: our autoscaling and routing against Ray Serve's own.

    python -m tests.benchmarks.fleet_sim [--quick] [--processes N]

Four models, 100 gangs at most. Ours runs with the deployment file's defaults and each model's target_backlog_seconds;
its two constants and the rare model's target were chosen on the training days. Serve's request-count policy is tuned
per model by grid on the same days: the setting with the fewest replica-hours whose p95 wait is at most ours there. Both
are then judged on days that neither has seen, some of another shape of traffic. Beside it stands what Serve could do at
best: of all settings on the grid's frontier the cheapest that reaches our p95 on that very day, chosen in hindsight.
Tables as markdown to stdout.
"""

import argparse
import itertools
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from deploy.spec import Autoscaling
from tests.benchmarks.fleet import Control, Fleet, Outcome
from tests.benchmarks.fleet_traffic import LOADS, Kind, Load, day

TRAINING: tuple[tuple[int, Kind], ...] = ((1, "diurnal"), (2, "diurnal"))
EVALUATION: tuple[tuple[int, Kind], ...] = (
    (11, "diurnal"), (12, "diurnal"), (13, "diurnal"), (21, "office"), (22, "office"),
)  # fmt: skip
TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)
"""Ongoing requests per gang. Gangs take one at a time, so more than 1 means that some wait."""

PACES = ((0.0, 30.0), (30.0, 30.0), (0.0, 90.0))
"""upscale_delay_s, look_back_period_s"""

DOWNSCALE_DELAYS = (60.0, 300.0, 600.0)
OURS_LOOK_BACK_S = 20.0


@dataclass(frozen=True)
class Point:
    """One setting of Serve's policy and what it came to on the training days."""

    control: Control
    hours: float
    p95_s: float


@dataclass(frozen=True)
class Verdict:
    """One model on one unseen day: ours, Serve as tuned, Serve as best in hindsight (None: no setting reaches ours)."""

    load: Load
    trace: tuple[int, Kind]
    ours: Outcome
    tuned: Outcome
    hindsight: Outcome | None

    @property
    def bar(self) -> str:
        """Whether ours used fewer replica-hours at an equal or better p95."""
        fewer = self.ours.replica_hours < self.tuned.replica_hours
        if fewer and self.ours.wait_s(0.95) <= self.tuned.wait_s(0.95):
            return "met"
        if self.hindsight is not None and self.ours.replica_hours < self.hindsight.replica_hours:
            return "met against hindsight"
        return "not met"


def main() -> None:
    """Tune, judge, print."""
    parser = argparse.ArgumentParser(description="A fleet of gangs, simulated.")
    parser.add_argument("--quick", action="store_true", help="a coarse grid, one day of each kind")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.processes) as pool:
        judged = list(pool.map(partial(judge, quick=arguments.quick), LOADS))
    print_verdicts([verdict for _, verdicts in judged for verdict in verdicts])
    for load, (frontier, _) in zip(LOADS, judged, strict=True):
        print_frontier(load, frontier)


def judge(load: Load, quick: bool) -> tuple[list[Point], list[Verdict]]:
    """Tune Serve's policy for one model and run the unseen days."""
    training = TRAINING[:1] if quick else TRAINING
    goal_s = pooled([run(load, ours(load), trace) for trace in training]).wait_s(0.95)
    settings = list(grid(load))[:: 7 if quick else 1]
    points = [point(load, setting, training) for setting in settings]
    frontier = [p for p in points if not any(q.hours < p.hours and q.p95_s <= p.p95_s for q in points)]
    frontier.sort(key=lambda p: p.hours)
    reaching = [p for p in frontier if p.p95_s <= goal_s]
    tuned = reaching[0] if reaching else frontier[-1]
    verdicts = []
    for trace in EVALUATION[2:4] if quick else EVALUATION:
        mine = run(load, ours(load), trace)
        theirs = {p: run(load, p.control, trace) for p in frontier}
        as_good = [outcome for outcome in theirs.values() if outcome.wait_s(0.95) <= mine.wait_s(0.95)]
        hindsight = min(as_good, key=lambda outcome: outcome.replica_hours, default=None)
        verdicts.append(Verdict(load, trace, mine, theirs[tuned], hindsight))
    return frontier, verdicts


def ours(load: Load) -> Control:
    """Our policy as a deployment file has it that gives target_backlog_seconds and nothing else."""
    spec = Autoscaling(target_backlog_seconds=load.target_s)
    delays = spec.upscale_delay_s, spec.downscale_delay_s, spec.downscale_to_zero_delay_s
    return Control(True, OURS_LOOK_BACK_S, *delays, target=load.target_s)


def grid(load: Load) -> Iterable[Control]:
    """All settings of Serve's policy that are tried for a model."""
    for target, (upscale_s, look_back_s), downscale_s in itertools.product(TARGETS, PACES, DOWNSCALE_DELAYS):
        for to_zero_s in (downscale_s,) if load.min_replicas else (downscale_s, 900.0, 1800.0):
            yield Control(False, look_back_s, upscale_s, downscale_s, to_zero_s, target)


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
        print(f"| {name} | {cells(verdict.ours)} | {cells(verdict.tuned)} | {best} | {verdict.bar} |")
    for name in dict.fromkeys(verdict.load.name for verdict in verdicts):
        some = [verdict for verdict in verdicts if verdict.load.name == name]
        print_sum(f"{name}, all days", some)
    print_sum("all models, all days", verdicts)


def print_sum(name: str, verdicts: list[Verdict]) -> None:
    """Several lines as one."""
    sides = [pooled([v.ours for v in verdicts]), pooled([v.tuned for v in verdicts])]
    change = sides[0].gang_s / sides[1].gang_s - 1
    met = sum(verdict.bar != "not met" for verdict in verdicts)
    print(f"| **{name}** | {cells(sides[0])} | {cells(sides[1])} | {change:+.0%} hours | {met} of {len(verdicts)} |")


def cells(outcome: Outcome) -> str:
    """Hours, utilisation, median and p95 wait."""
    waits = f"{outcome.wait_s(0.5):.1f} | {outcome.wait_s(0.95):.1f}"
    return f"{outcome.replica_hours:.0f} | {outcome.busy_s / outcome.gang_s:.0%} | {waits}"


def print_frontier(load: Load, frontier: list[Point]) -> None:
    """What Serve's policy can trade, on the training days."""
    print(f"\n{load.name}, Serve's frontier, hours of both training days:\n")
    print("| hours | p95 s | ongoing requests | upscale s | downscale s | to zero s | look-back s |")
    print("|---|---|---|---|---|---|---|")
    for p in frontier:
        c = p.control
        delays = f"{c.upscale_delay_s:.0f} | {c.downscale_delay_s:.0f} | {c.downscale_to_zero_delay_s:.0f}"
        print(f"| {p.hours:.0f} | {p.p95_s:.1f} | {c.target} | {delays} | {c.look_back_s:.0f} |")


if __name__ == "__main__":
    main()
