"""An object that stands in for a part of a pipeline, and changes some of what that does.

Used by `sp_core.tile_parallel` and `workers.model`.
"""

from typing import Any


class StandIn:
    """What this class and its subclasses do not have is the original's, and so is the class that `isinstance` sees:
    pipelines branch on it.

    Args:
        original: what it stands in for.
    """

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._original.__class__
