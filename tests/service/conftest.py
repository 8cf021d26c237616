"""Fixtures of the API without Ray.

Their imports are inside: pytest reads this file before `tests/conftest.py` has set Ray's environment, if a test of this
folder is named on its command line, and the API's modules import Ray.
"""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from tests.support.backend import FakeBackend


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
