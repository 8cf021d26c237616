"""Prometheus and its promtool, from Debian's package `prometheus`. Tests that need them are skipped where they lack."""

import shutil
import subprocess

import pytest


def promtool(*arguments: str, given: str = "") -> str:
    """Run promtool; return all that it says against what it was given, or an empty text."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("needs promtool: apt-get install prometheus")
    done = subprocess.run([tool, *arguments], input=given, capture_output=True, text=True, timeout=120)
    return "" if done.returncode == 0 and not done.stderr else f"{done.stdout}{done.stderr}".strip() or "it failed"
