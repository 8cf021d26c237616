"""Which device a rank uses, and what its process's environment says of it.

Each rank sees all GPUs of its node and is told which one is its own. A mask, which is Ray's default, hides the others
from NCCL and CUDA. It is blamed for slow first operations (pytorch#147502) and nodes that hang (ray#61073).
`workers.gang.rank_group` orders the ranks by what this file says, `workers.gang.rank` computes on it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.model_spec import ModelSpec

CUDA_ENVIRONMENT = {
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # sizes change with every request, and blocks would not fit
    "TORCHINDUCTOR_COMPILE_THREADS": "4",  # each rank starts its own pool, of 32 by default
}
"""What ranks on GPUs get, unless the model's `env` says otherwise."""


@dataclass(frozen=True)
class Place:
    """Where a rank's process runs.

    Attributes:
        node_id: the Ray node.
        pid: the process.
        gpu: the GPU that Ray gave it, by CUDA's number or UUID; empty for a rank on CPU.
    """

    node_id: str
    pid: int
    gpu: str

    @property
    def cuda_index(self) -> int:
        """Which of the devices that CUDA shows to this process is its own; 0 for a rank on CPU.

        Raises:
            ValueError: the process does not see it.
        """
        return _visible_index(self.gpu, os.environ) if self.gpu else 0


def own_place() -> Place:
    """Where this actor runs."""
    import ray  # here, for ranks of `workers.gang.local` have none, and start sooner without

    context = ray.get_runtime_context()
    gpus = [str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])]
    return Place(context.get_node_id(), os.getpid(), gpus[0] if gpus else "")


def environment(model: ModelSpec) -> dict[str, str]:
    """The environment variables of the model's ranks."""
    return (CUDA_ENVIRONMENT if model.device == "cuda" else {}) | model.env


def by_device(places: Sequence[Place]) -> list[int]:
    """Order processes so that neighboring ranks share a node, and are in the order of its GPUs.

    NCCL's one-node all-gather over NVLink SHARP returns data in the wrong order for ranks in another order (nccl#1906).

    Args:
        places: of the processes, by bundle. The node of the first stays first.

    Returns:
        The index of the process for rank 0, for rank 1, and so on.
    """
    nodes = list(dict.fromkeys(place.node_id for place in places))

    def key(index: int) -> tuple[int, int, str, int]:
        place = places[index]
        number = int(place.gpu) if place.gpu.isdecimal() else 0
        return nodes.index(place.node_id), number, place.gpu, index

    return sorted(range(len(places)), key=key)


def _visible_index(gpu: str, variables: Mapping[str, str]) -> int:
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        if gpu.isdecimal():
            return int(gpu)
        raise ValueError(f"GPU {gpu} has no number; let CUDA_VISIBLE_DEVICES of the Ray node name its GPUs")
    shown = [each.strip() for each in visible.split(",")]
    if gpu not in shown:
        raise ValueError(f"GPU {gpu} is not in CUDA_VISIBLE_DEVICES, {visible!r}; unset it in the model's env")
    return shown.index(gpu)
