"""`spray plan`: the sequence plan of a model class, found and proved."""

from service.cli.commands.verify import Config, NotTheSame, Target, World, numbers_of_ranks
from service.cli.options import UsageError


def plan(target: Target, config: Config = None, world: World = "2,3,4") -> None:
    """Find where the sequence of a model class is split and gathered, and prove it on every layout."""
    worlds = numbers_of_ranks(world)
    from sp_core.planner.movement import CannotPlan  # here, for they import torch
    from sp_core.planner.planner import plan_class
    from sp_core.planner.source import source_of
    from sp_core.verify.verify import Unverifiable

    try:
        plans = plan_class(target, config, worlds)
    except Unverifiable as error:
        raise UsageError(str(error)) from None
    except CannotPlan as error:
        raise NotTheSame(f"no plan: {error}") from None
    for found in plans:
        print(f"# {', '.join(found.variants)}: {found.way}")
        print("\n".join(f"#   {line}" for line in found.proofs))
        print(source_of(found.proposal), flush=True)
