"""The command line, run inside the test's process."""

import pytest

from service.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run `spray` with arguments; its exit code, standard output and standard error."""
    code = main(arguments)
    return (code, *capsys.readouterr())
