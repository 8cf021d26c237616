"""Fixtures of the API without Ray.

Their imports are inside: pytest reads this file before `tests/conftest.py` has set Ray's environment, if a test of this
folder is named on its command line, and the API's modules import Ray.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from tests.support.backend import FakeBackend


@pytest.fixture(autouse=True)
def outputs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of outputs and jobs: the test's own, or its module's.

    A runner takes whatever job it finds. In a folder that tests share, one ran the job that an earlier test had left.
    """
    if "SPRAY_OUTPUTS_DIR" not in os.environ:
        monkeypatch.setenv("SPRAY_OUTPUTS_DIR", str(tmp_path / "outputs"))
    return Path(os.environ["SPRAY_OUTPUTS_DIR"])


@pytest.fixture
def backend() -> "FakeBackend":
    """A backend that answers at once."""
    from tests.support.backend import FakeBackend

    return FakeBackend()


@pytest.fixture
def client(backend: "FakeBackend") -> "TestClient":
    """A client of the API in front of it. Whatever the application does not answer itself is raised in the test."""
    from fastapi.testclient import TestClient

    from service.api.rest import rest_app

    return TestClient(rest_app(backend))
