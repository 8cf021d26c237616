"""What an operator sees of a running cluster: in a real Prometheus, in traces, in profiles."""

import base64
import json
import os
import secrets
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from deploy.spec import Tracing
from service.cli.client import ServerError, read_cluster
from service.cli.main import main
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services
from service.rollout.local_cluster import LocalCluster
from tests.deploy.test_prometheus import FOLDER as RULES
from tests.support.deployments import deployment, model, rank_statuses, ready, wait_for
from tests.support.listeners import listeners, process_tree
from tests.support.otlp import Collector, Received, collector
from tests.support.out_of_tree import LATE_S
from tests.support.prometheus import answers, promtool, scraping
from tests.support.scraped import (
    Samples,
    check_of_the_node,
    check_requests,
    check_steps,
    check_traffic,
    scrape,
    until,
    value,
)

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


def test_a_prometheus_counts_what_callers_were_told(cluster: LocalCluster, tmp_path: Path) -> None:
    """To the last bit, of both models; and names the rank that is late. The first test: it counts from zero.

    The requests are traced, because each of their steps is timed then.
    """
    told = {
        name: [ask(cluster, name, secrets.token_hex(16)).json()["metrics"] for _ in range(2)]
        for name in ("demo", "late")
    }
    refused = httpx.post(
        f"{cluster.url}/v1/images/generations",
        json={"model": "demo", "prompt": "a", "size": "72x64"},
        timeout=300,
        trust_env=False,
    )
    assert refused.status_code == 400  # by the ranks: the deployment allows multiples of 8, the model of 16
    samples: Samples = {}

    def settled() -> bool:
        samples.update(scrape(cluster.metrics_url))
        gangs = value(samples, "spray_gangs", model="demo", state="running")
        wanted = value(samples, "spray_gangs_wanted", model="demo", reason="fixed")
        return gangs == wanted == 1 and value(samples, "spray_requests_in_flight", model="demo") == 0

    until(settled)
    assert promtool("check", "metrics", given=httpx.get(cluster.metrics_url, trust_env=False).text) == ""
    check_steps(samples, told["demo"])
    check_traffic(samples)
    check_requests(samples, told["demo"], calls=4)
    check_of_the_node(samples)
    with scraping(tmp_path, httpx.URL(cluster.metrics_url).port or 80, RULES / "rules.yml") as url:
        until(lambda: number(url, "up") == 1)
        for name, metrics in told.items():
            here = f'model="{name}"'
            assert number(url, f"sum(spray_step_seconds_count{{{here}}})") == 2 * 4 * 2  # requests x steps x ranks
            assert number(url, f"sum(spray_steps_total{{{here}}})") == 2 * 4
            sums = {"step_seconds_sum": sum(sum(each["step_seconds"]) for each in metrics)}
            sums["stage_seconds_sum"] = sum(each["decode_seconds"] for each in metrics)
            for series, seconds in sums.items():
                stage = ',stage="decode"' if series == "stage_seconds_sum" else ""
                counted = number(url, f'sum(spray_{series}{{{here},rank="0"{stage}}})')
                assert counted == pytest.approx(seconds, rel=1e-9)  # within 1 %, and far less
        until(lambda: bool(answers(url, "spray:backlog_seconds:per_capacity")))  # the rules have run
        assert not answers(url, 'ALERTS{alertstate="firing"}')
        ask(cluster, "late", secrets.token_hex(16))
        slowest = 'bottomk(1, spray:straggler_seconds:mean{model="late"})'
        until(lambda: [each["metric"]["rank"] for each in answers(url, slowest)] == ["1"])
        until(lambda: number(url, 'spray:straggler:share{model="late"}') > 0.2)
        assert number(url, "sum(spray_gang_restarts_total)") == 0
        check_the_alert(url, tmp_path)


def number(url: str, question: str) -> float:
    """The one number that a Prometheus answers; 0 if it has none."""
    found = answers(url, question)
    return float(found[0]["value"][1]) if found else 0.0


def check_the_alert(url: str, folder: Path) -> None:
    """On what was recorded, were it to go on for half an hour, the alert fires and names the rank."""
    asked = '{__name__=~"spray_(step|straggler)_seconds_(sum|count)",model="late"}'  # at once: a look may fail
    until(lambda: len(answers(url, asked)) == 8)
    recorded = answers(url, asked)
    assert len(recorded) == 8
    found = {(each["metric"]["__name__"], each["metric"]["rank"]): float(each["value"][1]) for each in recorded}
    waits, steps = (
        max(found[f"spray_{name}_seconds_sum", rank] / found[f"spray_{name}_seconds_count", rank] for rank in "01")
        for name in ("straggler", "step")
    )
    share, series = waits / steps, []
    for each in recorded:
        labels = {k: v for k, v in each["metric"].items() if k not in ("__name__", "instance", "job")}
        said = ",".join(f"{label}={json.dumps(text)}" for label, text in labels.items())
        name, a_minute = each["metric"]["__name__"], float(each["value"][1])
        series.append({"series": f"{name}{{{said}}}", "values": f"0+{a_minute:.12f}x40"})
    summary = f"{100 * share:.4g}% of each step of late, gang 0, is a wait for rank 1"
    annotations = {"summary": summary, "runbook": "deploy/README.md#one-rank-is-slow"}
    alert = {"exp_labels": {"severity": "warning", "model": "late", "replica": "0"}, "exp_annotations": annotations}
    case = {"eval_time": "30m", "alertname": "SprayStraggler", "exp_alerts": [alert]}
    test = {"interval": "1m", "input_series": series, "alert_rule_test": [case]}
    rules = {"rule_files": [str(RULES / "rules.yml")], "evaluation_interval": "1m", "tests": [test]}
    (file := folder / "recorded.yml").write_text(yaml.safe_dump(rules))
    said = promtool("test", "rules", str(file), said=True)
    assert "SUCCESS" in said, said


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
    assert waited[0] > waited[1] + LATE_S, waited  # of four forwards; a busy machine hides a part


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


@pytest.mark.fault
def test_a_request_that_loses_its_ranks_is_one_whole_trace(cluster: LocalCluster, kept: Collector) -> None:
    """A rank is killed in the middle of a step. The steps before are known of both; the second attempt is as any."""
    trace_id = secrets.token_hex(16)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ask, cluster, "late", trace_id, num_inference_steps=12)
        before = wait_for(lambda: rank_statuses("late"), lambda seen: all(3 <= each.step < 9 for each in seen))
        os.kill(before[1].pid, signal.SIGKILL)
        assert asked.result().status_code == 200
    spans = kept.trace(trace_id, SPANS + 1 + 1 + 2 + 2 * 3)  # once more queue, gang, ranks, and stages but for decode
    within = {span.span_id: [each for each in spans if each.parent_id == span.span_id] for span in spans}
    (whole,) = (span for span in spans if span.parent_id not in within)
    assert (whole.name, whole.parent_id, whole.failed) == ("request", CALLER, False)
    assert whole.attributes["spray.attempts"] == 2 and [name for name, *_ in whole.events] == ["lost"]
    first, second = sorted((span for span in spans if span.name == "gang"), key=lambda span: span.began)
    assert first.failed and first.said.startswith("GangLost") and not second.failed
    for attempt, seen in ((first, before), (second, None)):
        ranks = sorted(within[attempt.span_id], key=lambda span: span.name)
        assert [rank.name for rank in ranks] == ["rank 0", "rank 1"]
        for i, rank in enumerate(ranks):
            stages = {stage.name: stage for stage in within[rank.span_id]}
            steps = [told["step"] for _, _, told in stages["denoise"].events]
            assert steps == list(range(1, len(steps) + 1))
            assert rank.failed == stages["denoise"].failed == attempt.failed
            if seen is None:
                assert set(stages) == set(STAGES) and len(steps) == 12
                continue
            assert set(stages) == {"encode", "prepare", "denoise"}
            assert rank.said.startswith("GangLost") and rank.attributes["process.pid"] == before[i].pid
            assert seen[i].step - 1 <= len(steps) < 12  # the last one may have been on its way
            assert rank.ended <= attempt.ended


@pytest.mark.fault
def test_counts_go_on_whoever_dies(cluster: LocalCluster, tmp_path: Path) -> None:
    """The process that answers Prometheus is killed, then a rank of a gang that rests. No count is lost or doubled."""
    port = httpx.URL(cluster.metrics_url).port or 80
    with scraping(tmp_path, port, RULES / "rules.yml") as url:
        steps = 'sum(spray_step_seconds_count{model="demo"})'
        assert ask(cluster).status_code == 200  # it may be the first test of the file
        counted = scrape(cluster.metrics_url).items()
        before = sum(n for (name, of), n in counted if name == "spray_step_seconds_count" and ("model", "demo") in of)
        until(lambda: number(url, steps) == before > 0)
        assert ask(cluster).status_code == 200
        until(lambda: number(url, steps) == before + 8)
        holder = next(pid for pid in process_tree(os.getpid()) if any(at == port for _, at in listeners([pid])))
        os.kill(holder, signal.SIGKILL)
        until(lambda: value(scrape(cluster.metrics_url), "spray_steps_total", model="demo", replica="0") > 0)
        until(lambda: number(url, "up") == 1)
        assert number(url, steps) == before + 8
        pids = wait_for(lambda: ranks(cluster), lambda now: len(now) == 2)  # the holder may have been anybody
        restarts = number(url, 'sum(spray_gang_restarts_total{model="demo"})')
        os.kill(pids[1], signal.SIGKILL)
        wait_for(lambda: ranks(cluster), lambda now: len(now) == 2 and now != pids)
        for _ in range(2):
            assert ask(cluster).status_code == 200
        until(lambda: number(url, steps) == before + 3 * 8)
        assert number(url, 'sum(spray_gang_restarts_total{model="demo"})') == restarts + 1
        for name in (
            "steps_total",
            "step_seconds_count",
            "collective_bytes_total",
            "stage_seconds_sum",
            "requests_total",
        ):
            assert number(url, f"count(spray_{name})") > 0
            assert number(url, f"sum(resets(spray_{name}[10m]))") == 0, name  # so rates are those of what was done


def ranks(cluster: LocalCluster) -> list[int]:
    """The processes of the ranks of `demo`, if the cluster serves everything and all of them are alive."""
    try:
        waiting = httpx.get(f"{cluster.url}/readyz", timeout=30, trust_env=False).json()["waiting_for"]
        found = next(each for each in read_cluster(cluster.url)["models"] if each["id"] == "demo")
    except (ServerError, httpx.TransportError, KeyError):  # the gateway is replaced
        return []
    pids = [pid for gang in found["gangs"] for pid in gang["now"]["pids"] if not gang["replacing"]]
    return [] if waiting else [pid for pid in pids if Path(f"/proc/{pid}").exists()]
