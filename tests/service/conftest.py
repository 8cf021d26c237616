"""Fixtures of the API without Ray."""

import pytest
from fastapi.testclient import TestClient

from service.api.rest import rest_app
from tests.support.backend import FakeBackend


@pytest.fixture
def backend() -> FakeBackend:
    """A backend that answers at once."""
    return FakeBackend()


@pytest.fixture
def client(backend: FakeBackend) -> TestClient:
    """A client of the API in front of it. Whatever the application does not answer itself is raised in the test."""
    return TestClient(rest_app(backend))
