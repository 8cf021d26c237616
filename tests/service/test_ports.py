"""Who reaches a port, and the kinds of address that a local cluster can take."""

import socket
from pathlib import Path

import pytest

from deploy.gateway_spec import GatewaySpec
from deploy.spec import Auth, SpecError
from service.rollout import local_cluster as local
from service.rollout.ports import open_to_all
from tests.support.deployments import deployment, model

SPEC = deployment(model(Path("/nowhere")))


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [("0.0.0.0", None, True), ("10.0.0.7", None, True), ("::", None, True), ("0.0.0.0", "KEYS", False),
     ("127.0.0.1", None, False), ("::1", None, False), ("localhost", None, False)],
)  # fmt: skip
def test_a_deployment_that_is_open_to_all_draws_a_warning(host: str, keys: str | None, warned: bool) -> None:
    spec = SPEC.model_copy(update={"gateway": GatewaySpec(host=host), "auth": Auth(api_keys_env=keys)})
    assert bool(open_to_all(spec)) == warned
    assert not warned or f"anybody who reaches {host}:8000" in open_to_all(spec)


def test_a_host_may_be_an_ipv6_address() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with local._reserve_port("::1", 0) as reserved:
        assert reserved.getsockname()[0] == "::1"
    assert (local._in_url("::1"), local._in_url("127.0.0.1")) == ("[::1]", "127.0.0.1")


def test_shared_memory_that_cannot_be_written_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(local, "check_deployment", lambda *_: None)
    monkeypatch.setattr(local, "settle_here", lambda spec: spec)
    monkeypatch.setattr(local.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(SpecError, match="cannot be written"), local.LocalCluster(SPEC):
        pass
