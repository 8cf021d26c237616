"""The planner: finds a sequence plan for a class by observing forwards, and proves it on ranks.

    for found in plan_class("diffusers:QwenImageTransformer2DModel"): ...

A class comes in, as `sp_core.verify.verify` takes it: with its example in `sp_core.models`, an `_sp_example`, or a
config. For each variant the model runs at several lengths (`movement`), fitting plans are proposed (`proposals`), and
ranks check whether they give the same answer (`sp_core.verify`). The plan is the first proposal that fits all variants
and passes; a person reads it and checks it in. Nothing is planned while serving. Called by `spray plan`.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from sp_core.degrees import ParallelDegrees
from sp_core.models.family import ModelFamily
from sp_core.planner.movement import CannotPlan, Movement
from sp_core.planner.proposal import Proposal
from sp_core.planner.proposals import proposals
from sp_core.verify.rank_pool import RankFailed, RankPool
from sp_core.verify.verify import (
    BAR,
    BLIND,
    closing_pool,
    compare,
    find_probes,
    find_proofs,
    layouts,
)


@dataclass(frozen=True)
class Planned:
    """A plan that was proved.

    Attributes:
        way: the way of reading the calls.
        proposal: the plan and its reasons.
        variants: the variants of the class with which it was proved.
        proofs: lines of the report, one for each layout.
    """

    way: str
    proposal: Proposal
    variants: tuple[str, ...]
    proofs: tuple[str, ...]


def plan_class(
    target: str, config: Path | None = None, worlds: Sequence[int] = (2, 3, 4), pool: RankPool | None = None
) -> list[Planned]:
    """Find a plan for a class and prove it: one for all variants, or one for each if no plan is right for all.

    Args:
        target: `package.module:Class`.
        config: see `sp_core.verify.verify.verify`.
        worlds: numbers of ranks that prove it, all layouts of each.
        pool: ranks to use; None: some of its own.

    Raises:
        CannotPlan: no plan fits, or none gives the same answer; the message says what was tried, and where each fails.
        Unverifiable: the class cannot be found, built or called as described.
    """
    text = None if config is None else config.read_text()
    kind = target.partition(":")[2]
    of_variants = {name: _proposals_of(target, text, name) for name in find_proofs(target, text)}
    with nullcontext(pool) if pool else closing_pool(max(worlds)) as ranks:

        def first_proved(names: Sequence[str]) -> Planned:
            candidates = merged([of_variants[name] for name in names])
            return _first_proved(ranks, kind, (target, text), names, candidates, worlds)

        try:
            return [first_proved(list(of_variants))]
        except CannotPlan:
            if len(of_variants) == 1:
                raise
        return [first_proved([name]) for name in of_variants]


def _first_proved(
    pool: RankPool,
    kind: str,
    described: tuple[str, str | None],
    names: Sequence[str],
    candidates: Mapping[str, Proposal],
    worlds: Sequence[int],
) -> Planned:
    tried = []
    for way, proposal in candidates.items():
        family = proposal.family(kind)
        try:
            proofs = [
                _prove(pool, degrees, (*described, name), family)
                for world in worlds
                for degrees in layouts(world)
                for name in names
            ]
        except CannotPlan as failure:
            tried.append(f"{way}: {failure}")
            continue
        return Planned(way, proposal, tuple(names), tuple(proofs))
    raise CannotPlan("no proposal gives the same answer; " + "; ".join(tried))


def _prove(
    pool: RankPool, degrees: ParallelDegrees, arguments: tuple[str, str | None, str], family: ModelFamily
) -> str:
    """Prove one variant on one layout; returns a line of the report.

    Raises:
        CannotPlan: the answer differs, or stays the same with attention kept local.
    """
    head = f"{arguments[2]}, {degrees}"
    try:
        outcomes = pool.run(degrees, compare, *arguments, family)
    except RankFailed as failure:
        raise CannotPlan(f"{head}: {failure.said}") from None
    worst = max(by for outcome in outcomes for by in outcome.differences.values())
    control = min(max(outcome.controls[case] for outcome in outcomes) for case in outcomes[0].controls)
    if not worst <= BAR:
        first = next(first for outcome in outcomes for first in outcome.diverged.values())
        raise CannotPlan(f"{head}: differs by {worst:.1e}; first at {first}")
    if not control > BLIND:
        raise CannotPlan(f"{head}: proves nothing, for local attention differs by only {control:.1e}")
    return f"{head}: same within {worst:.1e} (with attention kept local: {control:.1e})"


def _proposals_of(target: str, config: str | None, name: str) -> dict[str, Proposal]:
    model, cases = find_probes(target, config, name)
    return proposals(model, Movement(model, cases))


def merged(of_variants: Sequence[Mapping[str, Proposal]]) -> dict[str, Proposal]:
    """One proposal for each way of reading that all variants allow, in the order of the first variant.

    Raises:
        CannotPlan: there is no such way.
    """
    first, *others = copy.deepcopy(list(of_variants))
    made: dict[str, Proposal] = {}
    for way, proposal in first.items():
        agreed = all(way in other and proposal.merge(other[way]) for other in others)
        if agreed and all(repr(proposal) != repr(each) for each in made.values()):  # in order: that of streams counts
            made[way] = proposal
    if not made:
        raise CannotPlan("the variants of the class need different plans")
    return made
