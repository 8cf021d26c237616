"""What `workers.gang.ray_internals` relies on inside Ray, and that no other file of workers does."""

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray._common import tls_utils
from ray._private import state
from ray.serve._private import replica

import workers
from workers.gang.ray_internals import available_resources_per_node, keep_replica_on_node_ip, process_of

WORKERS = Path(workers.__file__).parent


class Cluster:
    """Ray's view of a cluster, as far as it is asked."""

    def available_resources_per_node(self) -> dict[str, dict[str, float]]:
        return {"n1": {"CPU": 1.5}, "n2": {}}

    def actor_table(self, actor_id: str, **_: Any) -> dict[str, Any]:
        return {"Address": {"NodeID": "n1"}, "Pid": 7 if actor_id == "0a" else 0}


def test_available_resources_come_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not inspect.signature(state.GlobalState.available_resources_per_node).parameters.keys() - {"self"}
    monkeypatch.setattr(state, "state", Cluster())
    assert available_resources_per_node() == {"n1": {"CPU": 1.5}, "n2": {}}


def test_the_process_of_an_actor_is_known_once_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = inspect.getsource(state.GlobalState._gen_actor_info)
    assert all(f'"{key}"' in made for key in ("Address", "NodeID", "Pid"))
    monkeypatch.setattr(state, "state", Cluster())
    actors = [SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda name=name: name)) for name in ("0a", "0b")]
    assert [process_of(actor) for actor in actors] == [("n1", 7), None]


@pytest.mark.parametrize(("node", "bound"), [("10.0.0.7", "10.0.0.7:0"), ("fd00::7", "[fd00::7]:0")])
def test_a_replica_listens_at_its_nodes_address_only(monkeypatch: pytest.MonkeyPatch, node: str, bound: str) -> None:
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(replica.Replica)
    asked: list[str] = []
    monkeypatch.setattr(replica, "add_port_to_grpc_server", None)  # so that the test takes its change back
    monkeypatch.setattr(tls_utils, "add_port_to_grpc_server", lambda _, address: asked.append(address) or 1)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: node)
    keep_replica_on_node_ip()
    assert replica.add_port_to_grpc_server(None, "[::]:0") == 1
    assert asked == [bound]


def test_a_replica_whose_port_cannot_be_kept_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(replica, "add_port_to_grpc_server")
    with pytest.raises(RuntimeError, match="opens a replica's port in another way"):
        keep_replica_on_node_ip()


@pytest.mark.parametrize("package", ["ray", "diffusers", "torch", "transformers"])
def test_private_modules_are_imported_in_one_file_at_most(package: str) -> None:
    users = {
        path.name
        for path in WORKERS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if module.split(".")[0] == package and "._" in module
    }
    assert users == {"ray": {"ray_internals.py"}, "torch": {"torch_internals.py"}}.get(package, set())
