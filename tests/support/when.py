"""When tests that take minutes run."""

import os

import pytest

IN_FULL = pytest.mark.fault if os.environ.get("FULL") else pytest.mark.soak
"""A fault of `make fault FULL=1`, and of `make soak`: `make fault` alone has 15 minutes."""
