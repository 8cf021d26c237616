"""The ranks of a pool outlive a run that failed everywhere, never one that hangs; no run leaves threads to the next."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankFailed, RankPool
from tests.support.toys import TWO

pytestmark = pytest.mark.processes

kept: list[ParallelMesh] = []


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.stop()


def pid(mesh: ParallelMesh) -> int:
    return os.getpid()


def refuse(mesh: ParallelMesh) -> None:
    raise ValueError(f"rank {mesh.axis('gang').rank} refuses")


def leave_the_other_waiting(mesh: ParallelMesh) -> None:
    if mesh.axis("gang").rank == 0:
        raise ValueError("rank 0 leaves")
    dist.distributed_c10d._get_default_store().get("what nobody sets")


def die(mesh: ParallelMesh) -> None:
    if mesh.axis("gang").rank == 1:
        os._exit(1)
    mesh.agree(0)


def keep(mesh: ParallelMesh) -> int:
    """Threads of this process, with something that holds every mesh."""
    kept.append(mesh)
    mesh.agree(0)
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_run_that_fails_on_all_ranks_costs_no_new_processes(two: RankPool) -> None:
    before = two.run(TWO, pid)
    with pytest.raises(RankFailed, match="refuses"):
        two.run(TWO, refuse)
    assert two.run(TWO, pid) == before


def test_a_rank_that_waits_for_ever_is_replaced(two: RankPool) -> None:
    before = two.run(TWO, pid)
    with pytest.raises(RankFailed, match="rank 0 leaves"):
        two.run(TWO, leave_the_other_waiting)
    assert not set(two.run(TWO, pid)) & set(before)


def test_a_rank_that_dies_is_replaced(two: RankPool) -> None:
    before = two.run(TWO, pid)
    with pytest.raises(RankFailed):
        two.run(TWO, die)
    assert not set(two.run(TWO, pid)) & set(before)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_no_run_leaves_threads_behind(two: RankPool) -> None:
    first, *_, last = [max(two.run(TWO, keep)) for _ in range(5)]
    assert last <= first
