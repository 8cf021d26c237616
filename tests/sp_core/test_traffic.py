"""What a rank counts of its own collectives. That bytes are those of the formulas is in `test_bytes.py`."""

import time
from typing import Any

import pytest
import torch

from sp_core import collectives
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import MeshAxis, ParallelMesh
from sp_core.traffic import OPS, STEPS_PER_TIMED, Sent, Traffic, is_sampled
from sp_core.verify.rank_pool import RankPool

LATE_S = 1.0  # more than what ranks of a busy machine wait for each other anyway


def a_step(mesh: ParallelMesh, late: int) -> dict[str, Any]:
    """One step in which one rank comes late to the exchange, and what each rank says of it."""
    axis = mesh.axis("ulysses")
    size, mine = axis.size, axis.rank
    mesh.traffic.take_sent()
    collectives.all_reduce(torch.ones(3), axis)  # outside of a step: sent, not timed
    with mesh.traffic.step(timed=True) as spent:
        if mine == late:
            time.sleep(LATE_S)
        send = [10 * (other + 1) for other in range(size)]
        collectives.all_to_all(torch.ones(sum(send)), send, [10 * (mine + 1)] * size, axis)
        collectives.all_gather(torch.ones(2, 1 + mine), 1, [1 + rank for rank in range(size)], axis)
        collectives.RingShift(torch.ones(7), (7,), axis).wait()
    collectives.gather([torch.ones(5)] * 2, axis)
    told = mesh.broadcast(b"x" * 100 if mine == 0 else None)
    assert told == b"x" * 100 and spent is not None
    return {"sent": mesh.traffic.take_sent(), "seconds": spent.seconds(), "broadcasts": mesh.traffic.take_broadcasts()}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_who_waits_for_a_late_rank_is_in_collectives_longer(ranks: RankPool, size: int) -> None:
    late = size - 1
    found = ranks.run(ParallelDegrees(ulysses_degree=size), a_step, late)
    waited = [sum(each["seconds"].values()) for each in found]
    for rank, each in enumerate(found):
        expected = {
            "all_reduce": 2 * (size - 1) * 12 / size,
            "all_to_all": sum(40 * (other + 1) for other in range(size) if other != rank),
            "gather": (size - 1) * 4 * 2 * size + (40 if rank else 0),  # padded to the longest; then to rank 0
            "ring": 28,
            "broadcast": 0 if rank else 100 * (size - 1),
        }
        assert each["sent"] == pytest.approx({op: sent for op, sent in expected.items() if sent})
        assert set(each["seconds"]) == {"all_to_all", "gather", "ring"}
        assert len(each["broadcasts"]) == 1 and each["broadcasts"][0] > 0
    assert all(seconds - waited[late] > LATE_S / 2 for seconds in waited[:late])


def test_one_rank_alone_sends_nothing() -> None:
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    with mesh.traffic.step(timed=True) as spent:
        collectives.all_reduce(torch.ones(3), mesh.axis("tp"))
        mesh.broadcast(b"x")
    assert spent is not None and (spent.seconds(), mesh.traffic.take_sent()) == ({}, {})


class Event:
    """Stands for a CUDA event: `now` is the device's clock."""

    now, made = 0.0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


def test_a_gpu_times_one_step_of_a_few_and_counts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sp_core.traffic.torch.cuda.Event", Event)
    exchanges: list[int] = []
    monkeypatch.setattr("sp_core.collectives.dist.all_to_all_single", lambda *_, group: exchanges.append(1))
    counts, every = Traffic(on_cuda=True), 3
    axis, found = MeshAxis("ulysses", 0, 2, None, None, counts), {}
    for step in range(1, 2 * every + 1):
        with counts.step(step % every == 0) as spent:
            if spent:
                monkeypatch.setattr(Event, "now", 100.0 * step)
                spent.begin("ring")
                Event.now += step
                spent.end()
            collectives.all_to_all(torch.ones(4), [2, 2], [2, 2], axis)
        if spent:
            found[step] = spent.seconds()
            assert spent.seconds() == found[step]  # asked twice, counted once
    assert found == {step: {"ring": step} for step in (every, 2 * every)}
    assert Event.made == 4  # of the first timed step; the second has them again
    assert len(exchanges) == 2 * every
    assert counts.take_sent() == {"all_to_all": 8 * 2 * every}
    assert counts.take_sent() == {}


def test_names_of_collectives() -> None:
    assert OPS == ("all_to_all", "ring", "all_reduce", "broadcast", "gather") == Sent.__match_args__


def test_one_step_of_some_is_timed_another_one_of_each_request() -> None:
    firsts = set()
    for name in map(str, range(200)):
        sampled = [step for step in range(4 * STEPS_PER_TIMED) if is_sampled(name, step)]
        assert sampled == [sampled[0] + STEPS_PER_TIMED * i for i in range(4)]
        firsts.add(sampled[0])
    assert firsts == set(range(STEPS_PER_TIMED))
