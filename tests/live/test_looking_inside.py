"""What an operator sees of a running cluster: whole traces, whatever becomes of the collector; profiles."""

import base64
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from deploy.spec import Tracing
from service.cli.main import main
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import deployment, model, rank_statuses, ready
from tests.support.otlp import Collector, Received, collector

SPANS = 14
"""Of a request on two ranks."""

STAGES = ("encode", "prepare", "denoise", "decode")
CALLER = "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def kept() -> Iterator[Collector]:
    with collector() as kept:
        yield kept


@pytest.fixture(scope="module")
def cluster(demo_model: Path, kept: Collector) -> Iterator[LocalCluster]:
    late = model(demo_model, "late", ulysses_degree=2)
    late = late.model_copy(update={"transformer_class": "tests.support.out_of_tree:LateRank"})
    spec = deployment(model(demo_model, ulysses_degree=2), late)
    spec = spec.model_copy(update={"tracing": Tracing(otlp_endpoint=kept.url, sample_ratio=0)})
    with LocalCluster(spec) as cluster:
        ready(cluster)
        yield cluster


def ask(cluster: LocalCluster, name: str = "demo", trace_id: str = "", **fields: Any) -> httpx.Response:
    body = {"model": name, "prompt": "a cup of coffee", "seed": 7} | fields
    headers = {"traceparent": f"00-{trace_id}-{CALLER}-01"} if trace_id else {}
    url = f"{cluster.url}/v1/images/generations"
    answer = httpx.post(url, json=body, headers=headers, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer


def check_tree(spans: list[Received]) -> dict[str, Received]:
    """One whole trace: each part below the one that it is a part of, and within its time."""
    by_id = {span.span_id: span for span in spans}
    path = {}
    for span in spans:
        parent = by_id.get(span.parent_id)
        above = [parent.name] if parent and parent.name.startswith("rank ") else []
        path["/".join([*above, span.name])] = span
        if parent is not None and span.name != "encode_media":  # which the gateway places by its seconds
            assert parent.began <= span.began <= span.ended <= parent.ended, span.name
        assert not span.failed, span.said
    assert len(path) == len(spans) == SPANS
    of_ranks = {f"rank {rank}/{stage}" for rank in range(2) for stage in STAGES}
    assert set(path) == {"request", "queue", "gang", "encode_media", "rank 0", "rank 1", *of_ranks}
    parents = {name: by_id[span.parent_id].name for name, span in path.items() if span.parent_id in by_id}
    assert parents == {
        "queue": "request",
        "gang": "request",
        "encode_media": "request",
        "rank 0": "gang",
        "rank 1": "gang",
        **{name: name.partition("/")[0] for name in of_ranks},
    }
    assert path["request"].parent_id == CALLER
    return path


def test_a_trace_of_two_ranks_is_whole(cluster: LocalCluster, kept: Collector) -> None:
    answer = ask(cluster, trace_id=(trace_id := secrets.token_hex(16)))
    path = check_tree(kept.trace(trace_id, SPANS))
    assert answer.headers["traceparent"] == f"00-{trace_id}-{path['request'].span_id}-01"
    told = answer.json()["metrics"]
    assert path["request"].attributes["spray.outcome"] == "ok"
    assert path["gang"].attributes["spray.layout"] == told["layout"] == "ulysses_degree=2"
    pids = {status.rank: status.pid for status in rank_statuses("demo")}
    for rank in range(2):
        assert path[f"rank {rank}"].attributes["process.pid"] == pids[rank]
        steps = [attributes for name, _, attributes in path[f"rank {rank}/denoise"].events if name == "step"]
        assert [each["step"] for each in steps] == [1, 2, 3, 4]
        for each in steps:
            assert each["compute_seconds"] + each["communication_seconds"] == pytest.approx(each["seconds"])
            assert 0 <= each["waiting_seconds"] <= each["communication_seconds"] < each["seconds"]
        if rank == 0:
            assert [each["seconds"] for each in steps] == told["step_seconds"]
    assert path["request"].resource["process.pid"] != path["gang"].resource["process.pid"]


def test_over_grpc_too(cluster: LocalCluster, kept: Collector) -> None:
    trace_id = secrets.token_hex(16)
    params = pb.GenerationParams(model="demo", prompt="a cup", seed=7)
    with grpc.insecure_channel(cluster.grpc_target) as channel:
        stub = services.MediaGenerationServiceStub(channel)
        given = (("traceparent", f"00-{trace_id}-{CALLER}-01"),)
        _, call = stub.GenerateImage.with_call(pb.GenerateImageRequest(params=params), metadata=given, timeout=300)
        first = check_tree(kept.trace(trace_id, SPANS))["request"].span_id
        assert dict(call.trailing_metadata())["traceparent"] == f"00-{trace_id}-{first}-01"
        stream = stub.GenerateStream(pb.GenerateStreamRequest(params=params), metadata=given, timeout=300)
        assert list(stream)[-1].HasField("done")
        second = next(
            span for span in kept.trace(trace_id, 2 * SPANS) if span.name == "request" and span.span_id != first
        )
        assert dict(stream.trailing_metadata())["traceparent"] == f"00-{trace_id}-{second.span_id}-01"


def test_the_rank_that_is_late_is_seen_in_the_trace(cluster: LocalCluster, kept: Collector) -> None:
    ask(cluster, "late", trace_id=(trace_id := secrets.token_hex(16)))
    path = check_tree(kept.trace(trace_id, SPANS))
    waited = [sum(told["waiting_seconds"] for _, _, told in path[f"rank {rank}/denoise"].events) for rank in range(2)]
    assert waited[0] > waited[1] + 0.1, waited  # four forwards of 0.05 s; a busy machine hides a part


def test_a_collector_that_hangs_costs_nothing_but_spans(cluster: LocalCluster, kept: Collector) -> None:
    before, pids = ask(cluster), [status.pid for status in rank_statuses("demo")]
    assert "traceparent" not in before.headers  # nobody has asked for a trace, and the ratio is 0
    kept.answers.clear()
    try:
        answers = [ask(cluster, trace_id=secrets.token_hex(16)) for _ in range(3)]
    finally:
        kept.answers.set()
    drawn = {base64.b64decode(answer.json()["data"][0]["b64_json"]) for answer in (before, *answers)}
    assert len(drawn) == 1
    assert [status.pid for status in rank_statuses("demo")] == pids


def test_a_profile_of_both_ranks(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPRAY_SERVER", cluster.url)
    assert main(["profile", "late", "--steps", "2", "--output", str(tmp_path)]) == 0
    assert "aten::addmm" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [each["rank"] for each in summary["ranks"]] == [0, 1]
    first, second = summary["ranks"]
    assert first["waiting_seconds"] > second["waiting_seconds"]  # rank 1 comes late
    for each in summary["ranks"]:
        assert each["waiting_seconds"] <= each["communication_seconds"] < each["seconds"]
        events = json.loads((tmp_path / f"rank-{each['rank']}.json").read_text())["traceEvents"]
        assert sum("alltoall" in str(event.get("name")) for event in events) >= 2
