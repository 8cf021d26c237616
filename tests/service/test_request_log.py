"""Each request that a gateway has taken leaves one line, whatever its end; prompts only where they are asked for."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from ray.serve.schema import ServeStatus

from service.api.backend import Restarted
from service.api.observed import observing
from service.gateway import Gateway
from service.state.request_log import RequestLog, logger
from sp_core.degrees import ParallelDegrees
from tests.service.test_gateway import REQUEST, TABLE
from workers.errors import GangLost
from workers.messages import GenerationRequest, GenerationResult

RESULT = GenerationResult(
    outputs=(b"png",),
    seeds=(1,),
    degrees=ParallelDegrees(ulysses_degree=2, ring_degree=2),
    encode_seconds=0.25,
    step_seconds=(0.5, 0.5),
    decode_seconds=0.125,
    encode_media_seconds=0.0625,
)


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """What has been written to the standard error, by a log that is set up for the first time."""
    before, logger.handlers = logger.handlers, []
    yield lambda: capsys.readouterr().err.splitlines()
    logger.handlers = before


def ended(log: RequestLog, request: GenerationRequest = REQUEST, result: GenerationResult | None = RESULT) -> None:
    log.ended(request, "team a", "ok" if result else "worker_lost", 3.0, 2, result)


def test_a_line_of_json(lines: Callable[[], list[str]]) -> None:
    log = RequestLog()
    log.follow("json", prompts=False)
    ended(log, replace(REQUEST, num_frames=5))
    found = json.loads(*lines())
    assert found.pop("time").startswith("20")
    assert found == {
        "request_id": "a",
        "key": "team a",
        "model": "one",
        "outcome": "ok",
        "shape": "64x64x5",
        "n": 1,
        "steps": 4,
        "attempts": 2,
        "seconds": 3.0,
        "layout": str(RESULT.degrees),
        "queue_seconds": 1.562,
        "encode_seconds": 0.25,
        "denoise_seconds": 1.0,
        "decode_seconds": 0.125,
        "encode_media_seconds": 0.062,
    }


def test_a_line_of_text_stays_one_line(lines: Callable[[], list[str]]) -> None:
    log = RequestLog()
    log.follow("text", prompts=True)
    ended(log, replace(REQUEST, prompt='a "cup"\noutcome=ok', negative_prompt="x"), None)
    (line,) = lines()
    assert ' request_id=a key="team a" model=one outcome=worker_lost shape=64x64 n=1 steps=4 attempts=2 ' in line
    assert line.endswith(r' prompt="a \"cup\"\noutcome=ok" negative_prompt=x')
    assert "layout" not in line


def test_prompts_only_where_they_are_asked_for(lines: Callable[[], list[str]]) -> None:
    log = RequestLog()
    for prompts in (False, True):
        log.follow("json", prompts)
        ended(log)
    assert ["prompt" in json.loads(line) for line in lines()] == [False, True]
    assert not logger.propagate


@pytest.mark.parametrize(
    ("reports", "outcome", "attempts"),
    [
        ([RESULT], "ok", 1),
        ([Restarted(2, "lost"), RESULT], "ok", 2),
        ([Restarted(2, "lost"), GangLost("gone")], "worker_lost", 2),
        ([], "cancelled", 1),
    ],
    ids=["answered", "after a loss", "lost", "left"],
)
def test_a_gateway_writes_one_line_for_each_end(
    lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, reports: list[Any], outcome: str, attempts: int
) -> None:
    monkeypatch.setattr("service.state.poller._read", lambda: (ServeStatus(), [], [], {}))

    async def run(*_: Any) -> AsyncGenerator[Any]:
        for report in reports:
            if isinstance(report, Exception):
                raise report
            yield report

    async def story() -> None:
        gate = Gateway("test")
        await gate.reconfigure(TABLE | {"log": {"log_format": "json", "prompts": False}})
        monkeypatch.setattr(gate._dispatcher, "run", run)
        with contextlib.suppress(GangLost):
            async for _ in gate.generate(REQUEST):
                pass

    asyncio.run(story())
    found = [json.loads(line) for line in lines() if line.startswith("{")]
    assert [(line["outcome"], line["attempts"]) for line in found] == [(outcome, attempts)]
    assert ("layout" in found[0]) == (outcome == "ok")
    assert logging.getLogger("spray.requests") is logger


TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize("sampled", ["01", "00"])
def test_the_line_and_the_answer_name_the_trace(
    lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, sampled: str
) -> None:
    """The gang works for a span of the gateway, which is below the caller's; unless the caller wants none."""
    monkeypatch.setattr("service.state.poller._read", lambda: (ServeStatus(), [], [], {}))
    asked: list[GenerationRequest] = []

    async def run(request: GenerationRequest, *_: Any) -> AsyncGenerator[Any]:
        asked.append(request)
        yield RESULT

    async def story() -> dict[str, str]:
        gate = Gateway("test")
        traced = {"otlp_endpoint": "http://127.0.0.1:1", "sample_ratio": 1.0}  # where nobody answers
        await gate.reconfigure(TABLE | {"log": {"log_format": "json", "prompts": False}, "tracing": traced})
        monkeypatch.setattr(gate._dispatcher, "run", run)
        with observing("route", "200", f"00-{TRACE}-{PARENT}-{sampled}") as call:
            async for _ in gate.generate(REQUEST):
                pass
        return call.answer

    answer = asyncio.run(story())
    (line,) = [json.loads(line) for line in lines() if line.startswith("{")]
    if sampled == "00":
        assert ("trace_id" in line, answer, asked[0].traceparent) == (False, {}, "")
        return
    assert line["trace_id"] == TRACE
    assert answer == {"traceparent": asked[0].traceparent}
    assert asked[0].traceparent.startswith(f"00-{TRACE}-") and PARENT not in asked[0].traceparent
