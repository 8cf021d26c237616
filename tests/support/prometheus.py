"""Prometheus and its promtool, from Debian's package `prometheus`. Tests that need them are skipped where they lack."""

import random
import shutil
import subprocess

import pytest

from service.rollout.local_cluster import METRICS_PORTS
from service.rollout.ports import bind_error


def free_port() -> int:
    """One that the system gives to nobody while it is free."""
    return next(port for port in random.sample(METRICS_PORTS, 20) if not bind_error("127.0.0.1", port))


def program(name: str) -> str:
    """Where a program of Prometheus is."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: apt-get install prometheus")
    return found


def promtool(*arguments: str, given: str = "", said: bool = False) -> str:
    """Run promtool.

    Returns:
        All that it says against what it was given, or an empty text; with `said` all that it says.
    """
    command = [program("promtool"), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300)
    text = f"{done.stdout}{done.stderr}".strip()
    if said:
        return text
    return "" if done.returncode == 0 and not done.stderr else text or "it failed"
