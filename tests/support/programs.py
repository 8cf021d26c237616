"""Programs that some tests need besides Python: without one they are skipped with a message, but not in CI."""

import os
import shutil

import pytest


def needs(program: str, why: str) -> pytest.MarkDecorator:
    """Skip a test where a program is missing. In CI it runs and fails: `.ci/run` installs what tests need."""
    missing = shutil.which(program) is None and "CI" not in os.environ
    return pytest.mark.skipif(missing, reason=f"{program} is not installed: {why}")


needs_iproute = needs("ip", "two nodes are two network namespaces of this machine, joined by a cable")
needs_compiler = needs("g++", "torch.compile makes C++ on CPU")
