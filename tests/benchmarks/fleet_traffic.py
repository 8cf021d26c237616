"""Days of traffic for `tests.benchmarks.fleet_sim`: which requests arrive at a model when, and what each truly costs.

A `Load` says what a model is asked for; `day` draws one day of it from a seed. The costs are those of a gang that
knows the shape: a step grows a little faster than its tokens, and each request is a few percent off.
"""

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from sp_core.degrees import ParallelDegrees
from workers.messages import GenerationRequest, GenerationResult

DAY_S = 86400
TOKENS = 1024 * 1024
"""width x height x frames at which `step_s` holds."""

Kind = Literal["diurnal", "office"]


@dataclass(frozen=True)
class Load:
    """What one model is asked for.

    Attributes:
        name: the model.
        per_second: requests, as a mean over the day before bursts.
        sizes: (width, height, frames), each with its weight.
        steps: denoising steps, each with its weight.
        most_pictures: n is drawn from 1 to it; most ask for one.
        guided: share of requests with guidance, two forwards a step.
        step_s: seconds of one forward on `TOKENS` pixels.
        outside_s: seconds of encode and decode.
        startup_s: least and most seconds from asking for a gang until it serves.
        cold_s: seconds that the first request of a shape costs more on a gang.
        min_replicas: gangs that always run.
        max_replicas: gangs that may run at once.
        goal_s: the wait that 95 of 100 requests should not exceed.
    """

    name: str
    per_second: float
    sizes: tuple[tuple[tuple[int, int, int], float], ...]
    steps: tuple[tuple[int, float], ...]
    most_pictures: int
    guided: float
    step_s: float
    outside_s: float
    startup_s: tuple[float, float]
    cold_s: float
    min_replicas: int
    max_replicas: int
    goal_s: float


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes (seconds of the day), its forwards per step, and what it costs."""

    at_s: float
    request: GenerationRequest
    forwards: int
    result: GenerationResult
    seconds: float


SQUARE, WIDE, SMALL = (1024, 1024, 1), (1536, 1024, 1), (512, 512, 1)
LOADS = (
    Load("image, few steps", 0.15, ((SQUARE, 5), (SMALL, 3), (WIDE, 2)), ((8, 8), (16, 2)), 4, 0.0, 0.45, 0.9,
         (60, 90), 2, 1, 24, 12),
    Load("image, guided", 0.15, ((SQUARE, 5), (WIDE, 3), (SMALL, 2)), ((30, 4), (50, 5), (20, 1)), 2, 0.8, 0.25, 1.5,
         (80, 120), 4, 1, 34, 25),
    Load("video", 0.04, (((832, 480, 81), 6), ((832, 480, 33), 3), ((1280, 720, 81), 1)), ((40, 5), (20, 3), (8, 2)),
         1, 0.9, 0.045, 8, (120, 180), 10, 1, 36, 80),
    Load("video, rare", 0.002, (((832, 480, 49), 1), ((832, 480, 81), 1)), ((30, 1),), 1, 1.0, 0.04, 6,
         (100, 160), 8, 0, 6, 140),
)  # fmt: skip
"""100 gangs at most."""


@lru_cache(8)
def day(load: Load, seed: int, kind: Kind = "diurnal") -> list[Arrival]:
    """One day of requests, by time.

    `diurnal`: a sine over the day with bursts of five to thirty minutes. `office`: flat between steep mornings and
    evenings, a lunch break, short flash crowds, and twice the share of the rarest size, so other costs too.
    """
    rng = random.Random(f"{load.name} {seed} {kind}")
    bursts = [(rng.uniform(0, DAY_S), _burst_s(rng, kind), rng.uniform(1.5, 4)) for _ in range(rng.randint(5, 9))]
    phase = rng.uniform(-0.1, 0.1)
    most = load.per_second * 12
    arrivals, at_s = [], 0.0
    while True:
        at_s += rng.expovariate(most)
        if at_s >= DAY_S:
            return arrivals
        rate = load.per_second * _profile(at_s / DAY_S + phase, kind)
        rate *= max([1.0, *(times for began, lasts, times in bursts if 0 <= at_s - began < lasts)])
        if rng.random() < rate / most:
            arrivals.append(_arrival(load, at_s, rng, kind))


def _burst_s(rng: random.Random, kind: Kind) -> float:
    return rng.uniform(300, 1800) if kind == "diurnal" else rng.uniform(120, 480)


def _profile(time: float, kind: Kind) -> float:
    """The rate at a time of the day (0 to 1), as a multiple of the mean."""
    if kind == "diurnal":
        return 1 - 0.85 * math.cos(2 * math.pi * time)
    hour = 24 * time % 24
    return 0.15 if hour < 8 or hour >= 19 else 1.2 if 12 <= hour < 13.5 else 2.2


def _arrival(load: Load, at_s: float, rng: random.Random, kind: Kind) -> Arrival:
    weights = [weight for _, weight in load.sizes]
    if kind == "office":
        weights[-1] *= 2
    width, height, frames = rng.choices([size for size, _ in load.sizes], weights)[0]
    steps = rng.choices([steps for steps, _ in load.steps], [weight for _, weight in load.steps])[0]
    n = rng.choices(range(1, load.most_pictures + 1), [4, 1, 1, 1][: load.most_pictures])[0]
    forwards = 1 + (rng.random() < load.guided)
    request = GenerationRequest("r", load.name, "", width, height, steps, 0, num_frames=frames, n=n)
    tokens = width * height * frames / TOKENS
    step_s = load.step_s * forwards * n * tokens**1.15 * rng.lognormvariate(0, 0.04)
    outside_s = load.outside_s * n * rng.lognormvariate(0, 0.1)
    result = GenerationResult((), (), ParallelDegrees(), 0.3 * outside_s, (step_s,) * steps, 0.7 * outside_s)
    return Arrival(at_s, request, forwards, result, steps * step_s + outside_s)
