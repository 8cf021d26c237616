"""Arguments that several commands share, and reading a deployment file with them."""

import os
from pathlib import Path
from typing import Annotated

import typer

from deploy.load import LoadedSpec, load_with_origins
from service.cli.client import DEFAULT_SERVER

File = Annotated[Path, typer.Argument(metavar="FILE", help="Deployment file.", show_default=False)]

Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override a value of the file, such as models.NAME.parallel.ulysses_degree=2. May be repeated.",
        show_default=False,
    ),
]

Server = Annotated[
    str | None, typer.Option(help=f"Base URL of the server. Default: SPRAY_SERVER, or {DEFAULT_SERVER}.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")]


ResultAsJson = Annotated[bool, typer.Option("--json", help="Print what was made as JSON: files, seeds, seconds.")]


class UsageError(Exception):
    """The flags contradict each other, or a value makes no sense."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came. Like Ctrl-C, it ends what was started."""


def load(file: Path, overrides: list[str]) -> LoadedSpec:
    """Read a deployment file; `SPRAY_*` variables override it, and `--set` overrides both.

    Raises:
        SpecError: the file cannot be read, or something in it is wrong.
    """
    return load_with_origins(file, os.environ, overrides)
