"""The profile of a request's steps: a trace that Perfetto reads, the longest operators, what communication takes."""

import gzip
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankPool
from tests.support.deployments import model
from workers.errors import RequestFailed
from workers.gang.boundary import Boundary
from workers.gang.profiling import MOST_OPERATORS, StepProfile
from workers.messages import GenerationRequest, Profiled
from workers.model.denoising import Denoising
from workers.model.loader import load_model

REQUEST = GenerationRequest("a", "demo", "a fox", width=64, height=96, num_inference_steps=3, seed=3, profile=True)


def profiled(mesh: ParallelMesh, folder: Path, wanted: bool) -> list[Profiled]:
    """What a rank reports of the steps of a request."""
    rank = mesh.axis("gang").rank
    denoising = Denoising(load_model(model(folder, **asdict(mesh.degrees)), mesh), replace(REQUEST, profile=wanted))
    denoising.encode()
    denoising.share_encoded()
    denoising.prepare()
    boundary = Boundary(rank)

    def steps() -> Any:
        for end in denoising.steps(0):
            yield end, boundary.cross(mesh, REQUEST, None, sum((end.in_collectives or {}).values()))

    profile = StepProfile(rank, wanted, torch.device("cpu"))
    assert len(list(profile.around(steps()))) == 3
    return list(profile.report())


def test_each_rank_has_a_trace_and_its_longest_operators(ranks: RankPool, demo_model: Path) -> None:
    found = ranks.run(ParallelDegrees(ulysses_degree=2), profiled, demo_model, True)
    assert [told.rank for (told,) in found] == [0, 1]
    for (told,) in found:
        events = json.loads(gzip.decompress(told.trace))["traceEvents"]
        operators = [event for event in events if event.get("cat") == "cpu_op"]
        assert {"ph", "ts", "dur", "pid", "tid", "name"} <= set(operators[0])
        exchanges = sum("alltoall" in event["name"] for event in operators)
        assert exchanges >= 3 * 2, "three steps, each with exchanges in every block"
        assert told.steps == 3
        assert 0 <= told.waiting_seconds <= told.communication_seconds < told.seconds
        assert told.communication_seconds > 0
        times = [each.host_seconds for each in told.operators]
        assert times == sorted(times, reverse=True) and len(times) == MOST_OPERATORS
        calls = {each.name: each.calls for each in told.operators}
        matmuls = sum(event["name"] == "aten::addmm" for event in operators)
        assert calls["aten::addmm"] == matmuls > 0


def test_a_profile_that_cannot_be_written_is_the_request_s_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other error would cost the ranks, which are sound."""
    profile = StepProfile(0, True, torch.device("cpu"))
    assert list(profile.around(iter(()))) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(RequestFailed, match=r"rank 0 cannot write its profile: .*absent"):
        list(profile.report())


def test_nothing_is_recorded_where_nobody_asks(ranks: RankPool, demo_model: Path) -> None:
    assert ranks.run(ParallelDegrees(ulysses_degree=2), profiled, demo_model, False) == [[], []]
