"""What workers needs of Ray and Ray has no public name for. `tests/workers/test_ray_internals.py` pins it.

No other file of workers imports a module of Ray that begins with an underscore.
"""

from collections.abc import Mapping

from ray._private import state


def available_resources_per_node() -> Mapping[str, Mapping[str, float]]:
    """What nobody holds of each living node, by node id and by Ray's resource names; 0 where a name is absent.

    `ray.available_resources()` has only the sum over all nodes, and `ray.util.state` asks the dashboard, which a
    cluster may lack.
    """
    available: Mapping[str, Mapping[str, float]] = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return available
