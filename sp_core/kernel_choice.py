"""Which attention kernel all ranks take. Called by `sp_core.parallelize`.

Timings are noisy, so two ranks, or one before and after a restart, might take different kernels, whose last digits
differ: a request that is tried again would give another picture. So rank 0 chooses for all; a deployment may choose
for good.
"""

from collections.abc import Callable

import torch

from sp_core import cuda_kernels
from sp_core.mesh import ParallelMesh


def settle_kernel(
    mesh: ParallelMesh, dtype: torch.dtype, head_size: int | None, pinned: str | None
) -> Callable[[], None]:
    """Choose the kernel for attention without a mask. A collective of all ranks.

    Where no rank shares a sequence the model calls torch's attention, which then prefers the kernel.

    Args:
        mesh: the ranks.
        dtype: of queries, keys and values.
        head_size: of the model; None if unknown: each rank then chooses at its first attention.
        pinned: the name of the kernel; None: the fastest on rank 0.

    Returns:
        What undoes it.

    Raises:
        ValueError: the pinned kernel is unknown, or cannot be used in this layout.
        RuntimeError: no kernel works here, or the pinned one does not.
    """
    alone = mesh.degrees.sequence_parallel_size == 1
    candidates = cuda_kernels.TORCHS_OWN if alone else cuda_kernels.KERNELS
    if pinned is not None and pinned not in candidates:
        where = " where no ranks share a sequence" if alone else ""
        raise ValueError(f"attention_kernel {pinned!r} cannot be used{where}; choose from {', '.join(candidates)}")
    if mesh.device.type == "cpu" or dtype not in cuda_kernels.HALF or head_size is None:
        return lambda: None
    head_size += -head_size % cuda_kernels.HEAD_SIZES
    name = pinned
    if name is None and mesh.axis("gang").rank == 0:
        name = cuda_kernels.fastest(mesh.device, dtype, head_size, candidates)
    name = mesh.broadcast(None if name is None else name.encode()).decode()
    cuda_kernels.use(mesh.device, dtype, head_size, name)
    return cuda_kernels.prefer(name) if alone else lambda: None
