"""The key-value store of Ray's head: keys that outlive the processes that set them. For `service.state.quarantine`.

Ray's API for it is private, so only this file uses it, and `tests/service/test_head_store.py` pins the names.
"""

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_initialized,
    _internal_kv_list,
    _internal_kv_put,
)


class HeadStore:
    """A set of keys, shared by the processes of a cluster. Its methods block, and raise anything if the head is away.

    Args:
        namespace: keeps its keys apart from all others.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def connected(self) -> bool:
        """True if this process belongs to a cluster."""
        return bool(_internal_kv_initialized())  # type: ignore[no-untyped-call]

    def add(self, key: str) -> bool:
        """Add a key; return True."""
        _internal_kv_put(key, b"", namespace=self._namespace)
        return True

    def remove(self, key: str) -> None:
        """Remove a key, if it is there."""
        _internal_kv_del(key, namespace=self._namespace)

    def keys(self) -> list[str]:
        """All keys."""
        return [key.decode() for key in _internal_kv_list("", namespace=self._namespace)]
