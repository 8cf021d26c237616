"""Answers are encoded while the next request computes: few at once, each failure its own, none forgotten."""

import asyncio
import gc
import io
import threading
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from ray.exceptions import RayActorError

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from tests.support.deployments import model
from workers.errors import GangLost, OutOfMemory, RequestFailed
from workers.gang import encoding
from workers.gang.answers import MOST_OPEN, Answers
from workers.gang.encoding import Encoding
from workers.gang.rank import Rank
from workers.gang.rank_group import RankGroup
from workers.messages import Answer, Drawn, GenerationRequest, GenerationResult, RankStatus, StepEvent, Traced
from workers.model.loader import load_model
from workers.model.media import encode
from workers.tracing import Event

REQUEST = GenerationRequest("a", "demo", "a cup", 64, 48, 2, seed=1, report_steps=True)
SPEC = model(Path("/nowhere"))


def asked(request_id: str) -> GenerationRequest:
    return GenerationRequest(request_id, "demo", "a cup", 64, 48, 2, seed=1)


def took(seconds: float = 1.0) -> GenerationResult:
    return GenerationResult((), (1,), ParallelDegrees(), seconds, (seconds,), seconds)


def refuse(*_: Any) -> bytes:
    raise ValueError("no such color")


def run_dry(*_: Any) -> bytes:
    raise MemoryError


# on rank 0


def test_a_file_has_the_bytes_that_encoding_at_once_makes(demo_model: Path) -> None:
    spec = model(demo_model)
    rank = Rank(0, spec)
    rank._use(load_model(spec, ParallelMesh.create(spec.parallel, device_type="cpu", timeout_s=60)))
    denoising, _ = rank._begin(REQUEST)
    for _ in rank._denoise(denoising):
        pass
    expected = tuple(encode(made, REQUEST, number) for number, made in enumerate(denoising.finish()))
    *steps, drawn = rank.generate(REQUEST)
    assert [step.step for step in steps if isinstance(step, StepEvent)] == [1, 2]
    assert isinstance(drawn, Drawn)
    assert drawn.took.outputs == ()
    result = rank.answer(REQUEST.request_id)
    assert result.outputs == expected
    assert Image.open(io.BytesIO(result.outputs[0])).size == (64, 48)
    assert result.seconds == pytest.approx(drawn.took.seconds + result.encode_media_seconds)
    assert result.encode_media_seconds > 0
    with pytest.raises(KeyError):  # it keeps nothing
        rank.answer(REQUEST.request_id)


@pytest.mark.parametrize(("fails", "error"), [(refuse, RequestFailed), (run_dry, OutOfMemory)])
def test_a_file_that_cannot_be_made_fails_its_own_request(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, fails: Any, error: type[Exception]
) -> None:
    kept, picture = Encoding(), Image.new("RGB", (64, 48))
    for name in "ab":
        kept.keep(asked(name), [picture], took())
    with monkeypatch.context() as broken, pytest.raises(error) as failed:
        broken.setattr(encoding, "encode", fails)
        kept.encode("a", model(demo_model))
    assert type(failed.value) is error
    assert len(kept.encode("b", SPEC).outputs) == 1
    assert kept._waiting == {}


# in the gang


def test_few_answers_are_open_at_once() -> None:
    async def story() -> None:
        answers, results = Answers(60, pytest.fail), [asyncio.get_running_loop().create_future() for _ in range(3)]
        for result in results[: MOST_OPEN - 1]:
            answers.open(result)
            await asyncio.wait_for(answers.room(), 60)
        answers.open(results[MOST_OPEN - 1])
        waits = asyncio.ensure_future(answers.room())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waits.done()
        results[0].set_exception(RequestFailed("no such color"))  # as good as any other end
        await asyncio.wait_for(waits, 60)
        assert len(answers) == MOST_OPEN - 1
        with pytest.raises(RequestFailed):
            await results[0]
        ends = asyncio.ensure_future(answers.given())
        await asyncio.sleep(0)
        assert not ends.done()
        results[1].set_result(took())
        await asyncio.wait_for(ends, 60)

    asyncio.run(asyncio.wait_for(story(), 120))


def test_a_result_is_kept_for_a_gateway_that_reads_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a reference of Ray's: once nobody holds it, the gateway would find nothing and ask another gang."""
    monkeypatch.setattr("workers.gang.answers.KEPT_S", 0.2)

    async def story() -> None:
        answers, result = Answers(60, pytest.fail), asyncio.get_running_loop().create_future()
        held = weakref.ref(result)
        answers.open(result)
        result.set_result(took())
        del result
        await asyncio.wait_for(answers.given(), 60)
        gc.collect()
        assert held() is not None
        async with asyncio.timeout(60):
            while held() is not None:
                await asyncio.sleep(0.02)

    asyncio.run(story())


def test_an_answer_that_never_comes_costs_the_ranks() -> None:
    async def story() -> None:
        reasons: list[tuple[str, str]] = []
        answers = Answers(0.05, lambda *lost: reasons.append(lost))
        answers.open(asyncio.get_running_loop().create_future())
        await asyncio.wait_for(answers.given(), 60)
        assert reasons == [("encoding", "rank 0 has not encoded an answer within 0.05 s")]

    asyncio.run(asyncio.wait_for(story(), 120))


def test_an_answer_may_take_longer_behind_another() -> None:
    async def story() -> None:
        reasons: list[tuple[str, str]] = []
        answers, results = (
            Answers(3.0, lambda *lost: reasons.append(lost)),  # a busy machine may stand still for a second
            [asyncio.get_running_loop().create_future() for _ in range(2)],
        )
        for result in results:
            answers.open(result)
        await asyncio.sleep(1.7)
        results[0].set_result(took())
        await asyncio.sleep(1.7)
        results[1].set_result(took())
        await asyncio.wait_for(answers.given(), 60)
        assert reasons == []
        assert answers.any_given

    asyncio.run(asyncio.wait_for(story(), 120))


class FakeRank:
    """As far as `RankGroup.run` calls it: rank 0 of a gang of one, whose encoder waits until it may go on."""

    def __init__(self) -> None:
        self.generate = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._generate))
        self.answer = SimpleNamespace(remote=self._answer)
        self.cancel = SimpleNamespace(remote=lambda _: None)
        self.log: list[str] = []
        self.may: dict[str, asyncio.Future[GenerationResult]] = {}

    async def _generate(self, request: GenerationRequest) -> AsyncIterator[Any]:
        self.log.append(f"{request.request_id} begins")
        for report in (StepEvent(1, 1, 1.0), Drawn(request.request_id, took())):
            told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            told.set_result(report)
            yield told

    def _answer(self, request_id: str) -> "asyncio.Future[GenerationResult]":
        self.log.append(f"{request_id} is encoded")
        self.may[request_id] = asyncio.get_running_loop().create_future()
        return self.may[request_id]


async def run(group: RankGroup, request_id: str) -> Answer:
    await group.room()
    *_, drawn, answer = [report async for report in group.run(asked(request_id))]
    assert isinstance(drawn, Drawn)
    assert isinstance(answer, Answer)
    return answer


def test_the_next_request_runs_while_an_answer_is_encoded() -> None:
    async def story() -> None:
        rank = FakeRank()
        group = RankGroup(SPEC, [rank], [], {}, on_lost=lambda kind: None)
        first, second = await run(group, "first"), await run(group, "second")
        assert rank.log == ["first begins", "first is encoded", "second begins", "second is encoded"]
        assert group.answering
        third = asyncio.ensure_future(run(group, "third"))
        for _ in range(50):
            await asyncio.sleep(0)
        assert rank.log[4:] == []  # too many are open
        rank.may["first"].set_exception(RequestFailed("no such color"))
        await asyncio.wait_for(third, 60)
        rank.may["second"].set_result(took(2.0))
        assert (await second.result).encode_seconds == 2.0
        with pytest.raises(RequestFailed, match="no such color"):
            await first.result

    asyncio.run(asyncio.wait_for(story(), 120))


def test_pictures_of_a_caller_who_left_do_not_stay_on_the_rank() -> None:
    async def story() -> None:
        rank = FakeRank()
        group = RankGroup(SPEC, [rank], [], {}, on_lost=lambda kind: None)
        reports = group.run(asked("left"))
        await anext(reports)
        await reports.aclose()
        assert rank.log == ["left begins", "left is encoded"]
        rank.may["left"].set_exception(RayActorError())
        await asyncio.wait_for(group.answered(), 60)
        assert not group.answering

    asyncio.run(asyncio.wait_for(story(), 120))


def test_pictures_may_be_kept_and_encoded_by_two_threads() -> None:
    kept, done = Encoding(), threading.Event()
    picture = Image.new("RGB", (8, 8))

    def work() -> None:
        for number in range(100):
            while str(number) not in kept._waiting:
                pass
            kept.encode(str(number), SPEC)
        done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for number in range(100):
        kept.keep(asked(str(number)), [picture], took())
    assert done.wait(60)
    assert kept._waiting == {}


class TracedRank(FakeRank):
    """It says as it goes what it does; of the request "killed" it does not come to the end."""

    async def _generate(self, request: GenerationRequest) -> AsyncIterator[Any]:
        def told(*marks: Event) -> "asyncio.Future[Any]":
            told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            told.set_result(Traced(marks))
            return told

        yield told(Event("begin", 1.0), Event("denoise", 2.0), Event("step", 3.0))
        if request.request_id == "killed":
            raise RayActorError
        async for report in super()._generate(request):
            yield report
        yield told(Event("end", 4.0))


def traced(request_id: str) -> GenerationRequest:
    return replace(asked(request_id), traceparent=f"00-{'1' * 32}-{'2' * 16}-01")


def test_what_a_rank_did_is_told_whatever_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.gang.rank_group.kill_all", lambda *_: None)
    status = RankStatus(0, 7, "node", "idle", 0, "demo", 1.0, 0)

    async def story() -> None:
        told: list[Any] = []
        group = RankGroup(SPEC, [TracedRank()], [status], {}, on_lost=lambda kind: None)
        reports = group.run(traced("left"), told.extend)
        assert isinstance(await anext(reports), StepEvent)
        await reports.aclose()
        assert [(span.name, span.began_at, span.ended_at) for span in told] == [("rank 0", 1, 4), ("denoise", 2, 4)]
        reports = group.run(traced("stays"), told.extend)
        assert not [report async for report in reports if isinstance(report, Traced)]
        assert len(told) == 4 and not any(span.error for span in told)
        with pytest.raises(GangLost):
            [report async for report in group.run(traced("killed"), told.extend)]
        rank, denoise = told[4:]
        assert rank.error == denoise.error == f"GangLost: {group.lost}"
        assert [event.at for event in denoise.events] == [3.0]
        assert {span.parent_id for span in told if span.name == "rank 0"} == {"2" * 16}

    asyncio.run(asyncio.wait_for(story(), 120))
