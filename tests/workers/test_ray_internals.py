"""What `workers.gang.ray_internals` relies on inside Ray, and that no other file of workers does."""

import ast
import inspect
from pathlib import Path

import pytest
from ray._private import state

import workers
from workers.gang.ray_internals import available_resources_per_node

WORKERS = Path(workers.__file__).parent


class Cluster:
    """Ray's view of a cluster, as far as it is asked."""

    def available_resources_per_node(self) -> dict[str, dict[str, float]]:
        return {"n1": {"CPU": 1.5}, "n2": {}}


def test_available_resources_come_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not inspect.signature(state.GlobalState.available_resources_per_node).parameters.keys() - {"self"}
    monkeypatch.setattr(state, "state", Cluster())
    assert available_resources_per_node() == {"n1": {"CPU": 1.5}, "n2": {}}


@pytest.mark.parametrize("package", ["ray", "diffusers", "torch", "transformers"])
def test_private_modules_are_imported_in_one_file_at_most(package: str) -> None:
    users = [
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
    ]
    assert users == (["ray_internals.py"] if package == "ray" else [])
