"""What the command line says besides results, and what is wrong with how it was called."""

import sys


class UsageError(Exception):
    """The command line contradicts itself."""


def say(line: str) -> None:
    """One line for a person, on standard error; results go to standard output."""
    print(line, file=sys.stderr, flush=True)
