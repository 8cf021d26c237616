"""`spray doctor`: what `service.cli.doctor` finds, as a table."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.spec import SpecError
from service.cli.doctor import diagnose
from service.cli.options import Overrides, load
from service.cli.output import findings_table, show


def doctor(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Look at its weights and ports too.", show_default=False)
    ] = None,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
) -> None:
    """Look for common problems of this machine, and say what to do about them."""
    findings = diagnose(load(file, overrides).spec if file else None)
    show(findings_table([(finding.level, finding.name, finding.found, finding.advice) for finding in findings]))
    failed = [finding.name for finding in findings if finding.level == "fail"]
    if failed:
        raise SpecError(f"not in order: {', '.join(failed)}")
