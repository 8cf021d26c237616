"""`spray verify`: does a model class give the same answer on every layout?"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from service.cli.options import UsageError

Target = Annotated[str, typer.Argument(metavar="package.module:Class", help="The model class.")]
Config = Annotated[Path | None, typer.Option(help='JSON: {"init": {...}, "inputs": {...}}, or a diffusers config.')]
World = Annotated[str, typer.Option(metavar="RANKS", help="Numbers of ranks, comma-separated.")]


class NotTheSame(Exception):
    """A model failed its proof."""


def verify(
    target: Target,
    config: Config = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the ranks run.")] = "cpu",
    world: World = "2,3,4",
) -> None:
    """Prove that a model class gives the same answer on every layout."""
    worlds = numbers_of_ranks(world)
    import sp_core.verify.verify as proof  # here, for it imports torch

    try:
        good = True
        for is_good, line in proof.verify(target, config, worlds, device):
            print(line if is_good else f"{line}  <--", flush=True)
            good = good and is_good
    except proof.Unverifiable as error:
        raise UsageError(str(error)) from None
    if not good:
        raise NotTheSame("not every layout gives the answer of one process")


def numbers_of_ranks(text: str) -> tuple[int, ...]:
    """The numbers that `--world` names."""
    worlds = tuple(int(part) for part in text.split(",") if part.isdecimal())
    if not worlds or len(worlds) != text.count(",") + 1 or min(worlds) < 2:
        raise UsageError(f"--world: expected comma-separated numbers of at least 2 (2,3,4), got {text!r}")
    return worlds
