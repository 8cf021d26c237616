"""What is relied on of the key-value store that Ray keeps private."""

import inspect

import pytest
from ray.experimental import internal_kv

from service.state import head_store
from service.state.head_store import HeadStore


def test_rays_functions() -> None:
    for call, arguments in (
        (internal_kv._internal_kv_put, ["key", "value", "namespace"]),
        (internal_kv._internal_kv_del, ["key", "namespace"]),
        (internal_kv._internal_kv_list, ["prefix", "namespace"]),
    ):
        assert set(arguments) <= set(inspect.signature(call).parameters)
    assert not inspect.signature(internal_kv._internal_kv_initialized).parameters


def test_keys_are_kept_in_their_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: set[tuple[str, str]] = {("other", "b")}
    monkeypatch.setattr(head_store, "_internal_kv_put", lambda key, _, namespace: stored.add((namespace, key)))
    monkeypatch.setattr(head_store, "_internal_kv_del", lambda key, namespace: stored.discard((namespace, key)))
    monkeypatch.setattr(
        head_store,
        "_internal_kv_list",
        lambda prefix, namespace: [key.encode() for space, key in stored if space == namespace],
    )
    store = HeadStore("one")
    store.add("a")
    assert store.keys() == ["a"]
    store.remove("a")
    store.remove("a")
    assert store.keys() == []
    assert stored == {("other", "b")}


def test_without_a_cluster() -> None:
    assert not HeadStore("one").connected()
