"""A request with an idempotency key is done once: over REST and gRPC, at two gateways, and when one of them ends."""

import asyncio
import contextlib
import json
import os
import sqlite3
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

from service.api import once
from service.api.backend import Report
from service.api.observed import key_name
from service.api.rest import rest_app
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services
from service.state import kept_answers
from service.state.idempotency import IdempotencyKeys
from service.state.kept_answers import Claim, KeptAnswers
from service.state.output_folder import Folder
from sp_core.degrees import ParallelDegrees
from tests.support.backend import FakeBackend
from tests.support.grpc_calls import Backend, finished, params, served
from tests.support.waiting import until
from workers.errors import OutOfMemory, OutputsFull, RequestCancelled, RequestFailed
from workers.messages import GenerationRequest, GenerationResult

BODY = {"model": "one", "prompt": "a cup", "n": 2}
IMAGES = "/v1/images/generations"
RESULT = GenerationResult((b"one", b"two"), (3, 4), ParallelDegrees(2), 0.1, (0.2, 0.3), 0.4, ("w",), 0.5, 6.25)
REPLAYED = "idempotency-replayed"


class Gate(Backend):
    """A gateway that may be one of several, and dies when a test wants it."""

    def __init__(self, keeper: KeptAnswers) -> None:
        super().__init__()
        self.idempotency = IdempotencyKeys(f"gateway {id(self)}")
        self.idempotency._keeper = keeper
        self.failing: Exception | None = None

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        if self.failing is not None:
            self.requests.append(request)
            raise self.failing
        async for report in super()._generate(request):
            yield report


@pytest.fixture
def dead(tmp_path: Path) -> set[str]:
    return set()


@pytest.fixture
def keeper(tmp_path: Path, dead: set[str]) -> KeptAnswers:
    return KeptAnswers(str(tmp_path / "keys"), 60.0, 1 << 20, lives=lambda name: name not in dead)


@contextlib.asynccontextmanager
async def clients(*gates: FakeBackend) -> AsyncGenerator[list[httpx.AsyncClient]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                httpx.AsyncClient(transport=httpx.ASGITransport(rest_app(gate)), base_url="http://here")
            )
            for gate in gates
        ]


async def post(client: httpx.AsyncClient, key: str | None = "k", **body: Any) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return await client.post(IMAGES, json=BODY | body, headers=headers)


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 120))


def test_the_same_key_has_the_same_answer_at_any_gateway(keeper: KeptAnswers, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with clients(one := Gate(keeper), two := Gate(keeper)) as (a, b):
            first = await post(a)
            assert first.status_code == 200 and REPLAYED not in first.headers
            monkeypatch.setattr("service.api.responses.time.time", lambda: 0.0)  # nothing of the answer is of now
            for client in (a, b):
                again = await post(client)
                assert (again.content, again.headers[REPLAYED]) == (first.content, "true")
            assert len(one.requests + two.requests) == 1
            assert (await post(b, "another")).content != first.content  # the seed is drawn anew
            assert (await post(b, None)).content != first.content
            assert len(one.requests + two.requests) == 3

    run(story())


@pytest.mark.parametrize("other", [{"prompt": "b"}, {"n": 1}, {"seed": 3}, {"output_format": "webp"}])
def test_a_key_is_for_one_request(keeper: KeptAnswers, other: dict[str, Any]) -> None:
    async def story() -> None:
        async with clients(gate := Gate(keeper)) as (client,):
            assert (await post(client)).status_code == 200
            refused = await post(client, **other)
            assert (refused.status_code, refused.headers["x-should-retry"]) == (422, "false")
            assert refused.json()["error"]["code"] == "idempotency_key_reuse"
            assert refused.json()["error"]["param"] == "idempotency-key"
            assert len(gate.requests) == 1

    run(story())


@pytest.mark.parametrize("key", ["", "a" * 256, "\u00e9", "a\tb"])
def test_a_key_has_a_form(key: str) -> None:
    async def story() -> None:
        async with clients(gate := FakeBackend()) as (client,):
            headers = [(b"idempotency-key", key.encode())]
            refused = await client.post(IMAGES, json=BODY, headers=headers)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "idempotency-key")
            assert gate.requests == []

    run(story())


def test_two_callers_have_keys_of_their_own(keeper: KeptAnswers) -> None:
    async def story() -> None:
        async with clients(gate := Gate(keeper)) as (client,):
            first = await post(client)
            gate.caller = lambda: "another"  # type: ignore[method-assign]
            assert (await post(client)).content != first.content
            assert (await post(client, prompt="b", key="k2")).status_code == 200
            assert len(gate.requests) == 3

    run(story())


@pytest.mark.parametrize("form", ["b64_json", "url", "file"])
@pytest.mark.parametrize("streams", [False, True])
def test_who_asks_meanwhile_joins(
    keeper: KeptAnswers, form: str, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At another gateway, and however the answer is to come."""
    monkeypatch.setattr(once, "PATIENCE_S", 0.05)
    if form == "file" and streams:
        return

    async def story() -> None:
        async with clients(one := Gate(keeper), two := Gate(keeper)) as (a, b):
            first = asyncio.create_task(post(a, prompt="slow"))
            await until(lambda: one.requests)
            joined = asyncio.create_task(post(b, prompt="slow", response_format=form, stream=streams))
            await asyncio.sleep(0.2)
            assert not joined.done()
            one.released.set()
            answer, other = await first, await joined
            assert (other.status_code, other.headers[REPLAYED], two.requests) == (200, "true", [])
            if streams:
                assert ": one is running" in other.text
                assert other.text.count("event: image_generation.completed") == 2
                assert other.text.endswith("data: [DONE]\n\n")
            elif form == "b64_json":
                assert other.content == answer.content
            elif form == "url":
                for made, url in zip(answer.json()["data"], other.json()["data"], strict=True):
                    assert made["seed"] == url["seed"]
                    assert (await b.get(url["url"])).content == f"picture {made['seed']}".encode()

    run(story())


def test_when_the_gateway_dies_the_next_one_draws_the_same(keeper: KeptAnswers, dead: set[str]) -> None:
    async def story() -> None:
        async with clients(one := Gate(keeper), two := Gate(keeper)) as (a, b):
            first = asyncio.create_task(post(a, prompt="slow"))
            await until(lambda: one.requests)
            joined = asyncio.create_task(post(b, prompt="slow"))
            await asyncio.sleep(0.2)
            assert two.requests == []
            two.released.set()
            dead.add(one.idempotency._owner)
            answer = await joined
            assert answer.status_code == 200
            assert two.requests[0].seed == one.requests[0].seed
            one.released.set()  # it was alive after all
            assert (await first).content == answer.content

    run(story())


def test_a_claim_that_nobody_renews_is_lost_and_one_that_is_renewed_is_not(
    keeper: KeptAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_answers, "LEASE_S", 1.2)  # a busy machine may stand still for a good part of a second
    monkeypatch.setattr(kept_answers, "LOOK_S", 0.01)

    async def story() -> None:
        assert (await keeper.claim("k", "f", 1, "a", "1", 0.0)).state == "mine"
        for _ in range(15):
            await asyncio.sleep(0.1)
            assert await keeper.renew("k", "1")
            assert (await keeper.claim("k", "f", 2, "b", "2", 0.0)).state == "running"
        assert await keeper.claim("k", "f", 2, "b", "2", 60.0) == Claim("mine", 1)
        assert not await keeper.renew("k", "1")
        assert not await keeper.finish("k", "1", RESULT, "png")
        assert await keeper.finish("k", "2", RESULT, "png")
        assert await keeper.finish("k", "2", RESULT, "png")  # the call came twice
        assert await keeper.claim("k", "f", 3, "c", "3", 0.0) == Claim("done", 1, RESULT)

    run(story())


@pytest.mark.parametrize("leaves", ["unary", "stream"])
def test_who_leaves_lets_another_do_it(keeper: KeptAnswers, leaves: str) -> None:
    async def story() -> None:
        async with clients(one := Gate(keeper), two := Gate(keeper)) as (a, b):
            prompt = "slow" if leaves == "unary" else "never"
            leaving = asyncio.create_task(post(a, prompt=prompt, stream=leaves == "stream"))
            await until(lambda: one.requests)
            leaving.cancel()
            await until(lambda: one.closed)
            one.closed = False
            two.released.set()
            if prompt == "slow":
                assert (await post(b, prompt=prompt)).status_code == 200
            else:
                again = asyncio.create_task(post(b, prompt=prompt))
                await until(lambda: two.requests)
                again.cancel()
            assert two.requests[0].seed == one.requests[0].seed

    run(story())


@pytest.mark.parametrize(
    ("prompt", "code", "kept"),
    [("failed", "generation_failed", True), ("lost", "worker_lost", True), ("peer", "generation_failed", True),
     ("full", "queue_full", False), ("draining", "shutting_down", False), ("bug", "internal_error", False)],
)  # fmt: skip
def test_which_errors_end_the_work(keeper: KeptAnswers, prompt: str, code: str, kept: bool) -> None:
    async def story() -> None:
        gate = Gate(keeper)
        transport = httpx.ASGITransport(rest_app(gate), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            first = await post(client, prompt=prompt)
            again = await post(client, prompt=prompt)
            assert first.json() == again.json()
            assert first.json()["error"]["code"] == code
            assert (len(gate.requests), again.headers.get(REPLAYED)) == ((1, None) if kept else (2, None))
            assert len({request.seed for request in gate.requests}) == 1

    run(story())


@pytest.mark.parametrize(
    "error", [OutOfMemory("too large", True), RequestCancelled("by another call"), RequestFailed("no such color")]
)
def test_an_error_is_kept_as_it_was(keeper: KeptAnswers, error: Exception) -> None:
    async def story() -> None:
        gate = Gate(keeper)
        gate.failing = error
        async with clients(gate) as (client,):
            first = await post(client)
            gate.failing = None
            again = await post(client)
            assert (again.status_code, again.json()) == (first.status_code, first.json())
            assert len(gate.requests) == 1

    run(story())


def test_grpc_has_the_same_keys(keeper: KeptAnswers) -> None:
    async def story() -> None:
        one, two = Gate(keeper), Gate(keeper)
        async with clients(one) as (client,), served(two) as channel:
            first = await post(client)
            stub = services.MediaGenerationServiceStub(channel)
            same = params(prompt=BODY["prompt"], n=2)
            unary = await finished(
                stub.GenerateImage(pb.GenerateImageRequest(params=same), metadata=[("idempotency-key", "k")])
            )
            assert unary.trailing[REPLAYED] == "true"
            seeds = [picture["seed"] for picture in first.json()["data"]]
            assert [output.header.seed for output in unary.messages[0].outputs] == seeds
            stream = await finished(
                stub.GenerateStream(pb.GenerateStreamRequest(params=same), metadata=[("idempotency-key", "k")])
            )
            assert stream.trailing[REPLAYED] == "true"
            assert b"".join(e.output_chunk.data for e in stream.messages) == b"".join(
                f"picture {seed}".encode() for seed in seeds
            )
            assert two.requests == []
            other = pb.GenerateImageRequest(params=params(prompt="b"))
            refused = await finished(stub.GenerateImage(other, metadata=[("idempotency-key", "k")]))
            assert refused.code.name == "ALREADY_EXISTS"
            assert refused.details["ErrorInfo"].reason == "idempotency_key_reuse"

    run(story())


def test_answers_outlive_the_actor_and_lie_in_files(tmp_path: Path) -> None:
    folder = str(tmp_path / "keys")

    async def story() -> None:
        before = KeptAnswers(folder, 60.0, 1 << 20, lives=lambda _: True)
        await before.claim("k", "f", 3, "a", "1", 0.0)
        await before.finish("k", "1", RESULT, "png")
        await before.claim("failed", "f", 3, "a", "2", 0.0)
        await before.fail("failed", "2", OutOfMemory("too large", False))
        after = KeptAnswers(folder, 60.0, 1 << 20, lives=lambda _: True)
        assert await after.claim("k", "f", 9, "a", "3", 0.0) == Claim("done", 3, RESULT)
        failed = await after.claim("failed", "f", 9, "a", "4", 0.0)
        assert isinstance(failed.error, OutOfMemory)
        assert failed.error.args == ("too large", False)

    run(story())
    pictures = [file.read_bytes() for file in (tmp_path / "keys" / "files").glob("*.png")]
    assert sorted(pictures) == [b"one", b"two"]
    table = sqlite3.connect(tmp_path / "keys" / "idempotency.sqlite")
    (answer,) = table.execute("SELECT answer FROM answers_1 WHERE scope = 'k'").fetchone()
    assert "one" not in json.loads(answer)["result"]["outputs"]
    assert table.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_kept_answers_are_not_counted_among_outputs_and_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRAY_OUTPUTS_DIR", str(tmp_path / "own"))

    async def story() -> None:
        keeper = KeptAnswers(None, 60.0, 1 << 20, lives=lambda _: True)
        await keeper.claim("k", "f", 3, "a", "1", 0.0)
        assert await keeper.finish("k", "1", RESULT, "png")

    run(story())
    outputs, files = Folder(None), tmp_path / "own" / "files"
    outputs.check(max_bytes=0)
    assert len(list(files.glob("*.png"))) == 2
    for file in files.glob("*.png"):
        os.utime(file, (1, 1))
    outputs.sweep(60.0, counted=True)  # of a cluster that has ended, too
    assert not list(files.glob("*.png"))


def test_a_key_whose_gateway_died_is_forgotten_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: set[str]
) -> None:
    monkeypatch.setattr(kept_answers, "PERIOD_S", 0.01)

    async def story() -> None:
        keeper = KeptAnswers(str(tmp_path / "keys"), 0.1, 1 << 20, lives=lambda name: name not in dead)
        assert (await keeper.claim("at work", "f", 3, "a", "1", 0.0)).state == "mine"
        await asyncio.sleep(0.2)
        assert (await keeper.claim("at work", "another", 3, "b", "2", 0.0)).state == "reused", "its work goes on"
        dead.add("a")
        monkeypatch.setattr(kept_answers, "LEASE_S", 0.1)
        await until(lambda: keeper._keys == 0)  # nobody asked for it again
        assert (await keeper.claim("at work", "another", 3, "b", "2", 0.0)).state == "mine"

    run(story())


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "keys" / "files"

    async def story() -> None:
        keeper = KeptAnswers(str(tmp_path / "keys"), 60.0, 14, lives=lambda _: True)
        for number in range(3):
            await keeper.claim(str(number), "f", number, "a", str(number), 0.0)
            assert await keeper.finish(str(number), str(number), RESULT, "png")  # 6 bytes
        assert len(list(files.glob("*.png"))) == 4
        assert await keeper.claim("0", "f", 9, "a", "again", 0.0) == Claim("mine", 0)  # drawn again, with its seed
        assert (await keeper.claim("1", "f", 9, "a", "x", 0.0)).state == "done"
        monkeypatch.setattr(kept_answers, "MOST_KEYS", 2)
        await keeper.finish("0", "again", RESULT, "png")
        assert (await keeper.claim("1", "f", 9, "a", "y", 0.0)) == Claim("mine", 9)  # it is not known anymore
        assert len(list(files.glob("*.png"))) == 4

    run(story())


def test_keys_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_answers, "PERIOD_S", 0.05)

    async def story() -> None:
        keeper = KeptAnswers(str(tmp_path / "keys"), 0.3, 1 << 20, lives=lambda _: True)
        for key in ("k", "l"):
            await keeper.claim(key, "f", 1, "a", key, 0.0)
            await keeper.finish(key, key, RESULT, "png")
        await keeper.claim("runs", "f", 1, "a", "r", 0.0)
        await asyncio.sleep(0.35)
        assert await keeper.claim("k", "another", 2, "a", "2", 0.0) == Claim("mine", 2)
        await until(lambda: keeper._keys == 2)
        assert (await keeper.claim("runs", "f", 2, "a", "s", 0.0)).state == "running"

    run(story())


def test_without_a_place_to_keep_keys_nothing_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def story() -> None:
        gate = Gate(KeptAnswers(str(tmp_path / "file"), 60.0, 1 << 20))
        gate.idempotency.follow({"folder": str(tmp_path / "file")})
        async with clients(gate) as (client,):
            refused = await post(client)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert refused.json()["error"]["code"] == "idempotency_unavailable"
            assert gate.requests == []
            assert (await post(client, None)).status_code == 200

    run(story())


def test_nothing_is_drawn_whose_answer_cannot_be_kept(keeper: KeptAnswers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk fills up while the actor runs."""

    async def story() -> None:
        gate = Gate(keeper)
        async with clients(gate) as (client,):
            assert (await post(client, "before")).status_code == 200
            drawn = len(gate.requests)
            monkeypatch.setattr(keeper._files, "prepare", mock.Mock(side_effect=OutputsFull("full")))
            refused = await post(client, "after")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "idempotency_unavailable")
            assert len(gate.requests) == drawn
            assert (await post(client, "before")).status_code == 200  # it is there already
            monkeypatch.undo()
            assert (await post(client, "after")).status_code == 200

    run(story())


def test_only_so_many_wait_for_the_answers_of_others(keeper: KeptAnswers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "MOST_WAITING", 2)

    async def story() -> None:
        async with clients(gate := Gate(keeper)) as (client,):
            asked = [asyncio.create_task(post(client, prompt="slow"))]
            await until(lambda: gate.requests)
            asked += [asyncio.create_task(post(client, prompt="slow")) for _ in range(2)]
            await until(lambda: len(once._waiting) == 2)
            assert (await post(client, prompt="slow")).status_code == 429
            gate.released.set()
            assert {(await each).status_code for each in asked} == {200}
            assert len(once._waiting) == 0

    run(story())


def test_a_key_waits_for_the_answers_of_others_up_to_its_share(
    keeper: KeptAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once, "MOST_OF_ONE", 1)

    async def story() -> None:
        async with clients(gate := Gate(keeper)) as (client,):
            monkeypatch.setattr(gate, "admit", lambda _, admin=False: key_name.set("mine"))
            asked = [asyncio.create_task(post(client, prompt="slow"))]
            await until(lambda: gate.requests)
            asked.append(asyncio.create_task(post(client, prompt="slow")))
            await until(lambda: len(once._waiting) == 1)
            refused = await post(client, prompt="slow")
            assert (refused.status_code, "1 of your calls wait" in refused.text) == (429, True)
            monkeypatch.setattr(gate, "admit", lambda _, admin=False: key_name.set("another"))
            asked.append(asyncio.create_task(post(client, prompt="slow")))
            await until(lambda: len(once._waiting) == 2)
            gate.released.set()
            assert {(await each).status_code for each in asked} == {200}

    run(story())
