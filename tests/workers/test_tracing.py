"""Spans reach a collector as they were recorded; one that is away holds nobody up; what is not traced costs nothing."""

import asyncio
import subprocess
import sys
import time

import pytest

from tests.support.otlp import collector
from workers import tracing as module
from workers.gang.rank_spans import RankSpans
from workers.gang.rank_trace import RankTrace
from workers.messages import GenerationRequest, RankStatus
from workers.model.step_ends import StepEnd
from workers.tracing import Place, Span, Tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = f"00-{TRACE}-{PARENT}-01"
REQUEST = GenerationRequest("r", "m", "a cup", 64, 64, 4, seed=1, traceparent=GIVEN)


def test_what_is_a_traceparent() -> None:
    assert Place.parse(GIVEN) == Place(TRACE, PARENT, True)
    assert str(Place.parse(GIVEN)) == GIVEN
    assert Place.parse(f"00-{TRACE}-{PARENT}-00") == Place(TRACE, PARENT, False)
    assert Place.parse(f"cc-{TRACE}-{PARENT}-01-of a later version") == Place(TRACE, PARENT, True)
    wrong = ["", "00", f"ff-{TRACE}-{PARENT}-01", f"{GIVEN}-more", GIVEN.upper(), f"00-{'0' * 32}-{PARENT}-01"]
    for given in (*wrong, f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{PARENT}-1", f" {GIVEN}", f"{GIVEN}\n"):
        assert Place.parse(given) is None, given


@pytest.mark.parametrize(
    ("given", "ratio", "traced"),
    [(GIVEN, 0.0, True), (f"00-{TRACE}-{PARENT}-00", 1.0, False), ("nonsense", 1.0, True), ("", 0.0, False)],
    ids=["the caller traces", "the caller does not", "the ratio, by nonsense", "the ratio"],
)
def test_who_is_traced(given: str, ratio: float, traced: bool) -> None:
    tracing = Tracing()
    assert not tracing.request(GIVEN, "request", {}).traceparent  # before there is a collector
    with collector() as kept:
        tracing.follow(kept.url, ratio)
        span = tracing.request(given, "request", {})
        tracing.follow(None, ratio)
        assert not tracing.request(GIVEN, "request", {}).traceparent
    assert bool(span.traceparent) == traced
    assert (span.traceparent[3:35] == TRACE) == (given == GIVEN)
    assert bool(span.end()) == traced


def test_a_collector_gets_a_trace_as_it_was_recorded() -> None:
    with collector() as kept:
        tracing = Tracing()
        tracing.follow(kept.url, 1.0)
        request = tracing.request(GIVEN, "request", {"spray.n": 2, "spray.key": "web"})
        request.inner("queue", request.now() - 0.25)
        with pytest.raises(ValueError, match="why"), tracing.span(request.traceparent, "gang", {}) as gang:
            for rank in range(2):
                trace, of_rank = RankTrace(asked(gang.traceparent)), RankSpans(gang.traceparent, status(rank))
                trace.stage("encode")
                trace.stage("denoise")
                trace.step(StepEnd(1, 0.5, True, {"all_to_all": 0.125, "gather": 0.125}), 1, 0.0625)
                for traced in (*trace.told(), *trace.told(), *trace.end()):
                    of_rank.add(traced.marks)
                gang.add(of_rank.end())
            raise ValueError("why")
        tracing.send(request.end())
        spans = {span.name: span for span in kept.trace(TRACE, 9)}
        ranks = [span for span in kept.spans if span.name.startswith("rank ")]
        stages = [span for span in kept.spans if span.name in ("encode", "denoise")]
    assert (spans["request"].parent_id, spans["request"].kind) == (PARENT, 2)  # of a server
    assert spans["request"].attributes == {"spray.n": 2, "spray.key": "web"}
    assert spans["request"].resource["service.name"] == "spray"
    assert spans["queue"].parent_id == spans["gang"].parent_id == spans["request"].span_id
    assert spans["queue"].ended - spans["queue"].began == pytest.approx(0.25e9, rel=1e-3)
    assert (spans["gang"].failed, spans["gang"].said) == (True, "ValueError: why")
    assert {rank.parent_id for rank in ranks} == {spans["gang"].span_id}
    assert sorted(rank.attributes["spray.rank"] for rank in ranks) == [0, 1]
    assert sorted(stage.parent_id for stage in stages) == sorted([rank.span_id for rank in ranks] * 2)
    assert len({span.span_id for span in kept.spans}) == 9
    ((name, at, told),) = spans["denoise"].events
    assert spans["denoise"].began <= at <= spans["denoise"].ended
    assert (name, told) == (
        "step",
        {
            "step": 1,
            "total_steps": 1,
            "seconds": 0.5,
            "compute_seconds": 0.25,
            "communication_seconds": 0.25,
            "waiting_seconds": 0.0625,
        },
    )


def asked(traceparent: str) -> GenerationRequest:
    return GenerationRequest("r", "m", "a cup", 64, 64, 4, seed=1, traceparent=traceparent)


def status(rank: int) -> RankStatus:
    return RankStatus(rank, 7, "node", "denoise", 0, "m", 1.0, 0)


def test_a_rank_that_fails_says_in_which_stage() -> None:
    trace, spans = RankTrace(REQUEST), RankSpans(GIVEN, status(1))
    trace.stage("encode")
    trace.stage("denoise")
    for traced in trace.end():
        spans.add(traced.marks)
    spans.error = said = "RuntimeError: no memory"
    rank, *stages = spans.end()
    assert (rank.name, rank.error) == ("rank 1", said)
    assert [(stage.name, stage.error) for stage in stages] == [("encode", ""), ("denoise", said)]


def test_a_rank_that_is_lost_leaves_what_it_has_told() -> None:
    """It was killed in its third step: two are known. Its spans end now, and say why."""
    trace, spans = RankTrace(REQUEST), RankSpans(GIVEN, status(1))
    trace.stage("encode")
    trace.stage("denoise")
    for step in (1, 2):
        trace.step(StepEnd(step, 0.5, True), 4, 0.0)
        for traced in trace.told():
            spans.add(traced.marks)
    trace.stage("decode")  # nobody hears of it
    before = time.time()
    rank, encode, denoise = spans.end("the process of rank 1 is stopped or dead")
    assert rank.error == denoise.error == "GangLost: the process of rank 1 is stopped or dead"
    assert (encode.name, encode.error, encode.ended_at) == ("encode", "", denoise.began_at)
    assert [event.attributes["step"] for event in denoise.events] == [1, 2]
    assert {encode.parent_id, denoise.parent_id} == {rank.place.span_id} and rank.parent_id == PARENT
    assert before <= rank.ended_at == denoise.ended_at <= time.time()
    (silent,) = RankSpans(GIVEN, status(0)).end("it was lost before it had begun")
    assert silent.error and silent.parent_id == PARENT and silent.began_at <= silent.ended_at


def test_what_is_not_traced_is_not_marked() -> None:
    untraced = RankTrace(GenerationRequest("r", "m", "a cup", 64, 64, 4, seed=1))
    untraced.stage("denoise")
    untraced.step(StepEnd(1, 0.5, True), 1, 0.0)
    assert [*untraced.told(), *untraced.end()] == []


def test_a_collector_that_does_not_answer_holds_nobody_up() -> None:
    tracing, span = Tracing(), Span(Place(TRACE, PARENT), "", "request", 1.0, 2.0)
    with collector() as kept:
        kept.answers.clear()
        tracing.follow(kept.url, 1.0)
        for _ in range(10_000):  # more than may wait
            tracing.send([span])
        assert kept.spans == []  # all were taken while the collector has not answered once
        kept.answers.set()
        kept.trace(TRACE, 1000)
    tracing.send([span])  # it is gone
    tracing.follow("http://127.0.0.1:1", 1.0)
    tracing.send([span])
    tracing.follow(None, 1.0)


def test_the_last_spans_of_a_process_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing, span = Tracing(), Span(Place(TRACE, PARENT), "", "request", 1.0, 2.0)
    asyncio.run(tracing.close())  # of none
    with collector() as kept:
        tracing.follow(kept.url, 1.0)
        assert tracing.on
        tracing.send([span])
        asyncio.run(tracing.close())
        assert [each.trace_id for each in kept.spans] == [TRACE]
        tracing.send([span])
        assert not tracing.on
        tracing.follow(kept.url, 1.0)
        assert tracing.on  # again
        kept.answers.clear()
        monkeypatch.setattr(module, "LAST_S", 0.2)
        tracing.send([span])
        began = time.monotonic()
        asyncio.run(asyncio.wait_for(tracing.close(), 30))  # of a collector that does not answer
        assert time.monotonic() - began < 8  # not until the sender itself gives up


UNTRACED = """
import sys
from workers.tracing import Tracing
tracing = Tracing()
tracing.follow(None, 1.0)
with tracing.span(sys.argv[1], "gang", {}) as span:
    pass
print(span.traceparent == "", [name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_who_does_not_trace_loads_nothing_of_it() -> None:
    run = subprocess.run([sys.executable, "-c", UNTRACED, GIVEN], capture_output=True, text=True, timeout=120)
    assert (run.stdout, run.stderr) == ("True []\n", "")
