"""Callers hear of the end of their jobs: signed, at least once, whatever fails meanwhile; and nobody else is called."""

import asyncio
import base64
import contextlib
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from standardwebhooks import Webhook, WebhookVerificationError

from deploy.gateway_spec import GatewaySpec
from deploy.spec import SpecError
from service.jobs import outbox
from service.jobs import webhooks as module
from service.jobs.outbox import KEEP_S
from service.jobs.records import Delivery
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.jobs.webhooks import LEASE_S, Webhooks
from service.public_address import AddressRefused
from tests.service.jobs.stores import BROKEN, new_job
from workers.errors import InvalidParameter

KEY, OLD_KEY = (f"whsec_{base64.b64encode(bytes([number]) * 32).decode()}" for number in (1, 2))
HOSTS = ("127.0.0.1", "localhost", "hooks.example.com")


class Receiver(ThreadingHTTPServer):
    """Keeps what it is sent, and answers with the next of its statuses; 200 where there is none left."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.answers = threading.Event()
        self.answers.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook?a=b"

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.received]


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.server.answers.wait(60)
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        with contextlib.suppress(OSError):  # the sender was killed
            self.send_response(status)
            self.send_header("location", "/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

    def do_GET(self) -> None:
        raise AssertionError("a redirect was followed")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.answers.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOKS", f"{KEY} {OLD_KEY}")
    monkeypatch.setattr(module, "PERIOD_S", 0.01)
    monkeypatch.setattr(module, "AGAIN_S", (0.0, 0.02))


def outcomes() -> dict[str, float]:
    names = ("delivered", "refused", "unreachable", "given_up")
    return {name: REGISTRY.get_sample_value("spray_webhooks_total", {"outcome": name}) or 0.0 for name in names}


def end_a_job(folder: Path, url: str | None) -> Jobs:
    """A store with a job that has failed."""
    jobs = Jobs()
    jobs.follow(str(folder), None, 1000.0)

    async def run() -> None:
        job, _ = await jobs.ask(JobStore.submit, new_job(webhook_url=url))
        (held,) = await jobs.ask(JobStore.claim, {"film": 1}, "r", 30.0)
        await jobs.ask(JobStore.fail, job.id, held.fence, BROKEN)

    asyncio.run(run())
    return jobs


def sending(jobs: Jobs, until: Callable[[], bool], hosts: tuple[str, ...] = HOSTS) -> None:
    """Send what is due until something holds, and nothing is on its way."""

    async def run() -> None:
        hooks = Webhooks(jobs)
        hooks.follow(hosts, "HOOKS")
        async with asyncio.timeout(30):
            while not until() or hooks._sending:
                await asyncio.sleep(0.01)
        assert hooks._following is not None
        hooks._following.cancel()

    asyncio.run(run())


def left(jobs: Jobs) -> int:
    assert jobs._own is not None
    with jobs._own._database.transaction() as (connection, _):
        return int(connection.exec_driver_sql("SELECT count(*) FROM webhooks").scalar_one())


def test_a_receiver_hears_once_signed_by_every_key(receiver: Receiver, tmp_path: Path) -> None:
    jobs, before = end_a_job(tmp_path, receiver.url), outcomes()
    sending(jobs, lambda: bool(receiver.received))
    ((headers, body),) = receiver.received
    for key in (KEY, OLD_KEY):
        assert Webhook(key).verify(body, headers) == json.loads(body)
    with pytest.raises(WebhookVerificationError):
        Webhook(KEY).verify(body + b" ", headers)
    told = json.loads(body)
    assert (told["type"], told["data"]["state"], told["data"]["kind"]) == ("job.failed", "failed", "video")
    assert told["data"]["error"] == {"code": "generation_failed", "message": "rank 1: MemoryError", "param": None}
    assert set(told["data"]) == {"object", "id", "kind", "model", "state", "error", "created_at", "ended_at"}
    assert headers["content-type"] == "application/json"
    assert headers["host"] == receiver.url.split("/")[2]
    assert left(jobs) == 0
    assert outcomes() == before | {"delivered": before["delivered"] + 1}


def test_one_that_fails_first_hears_the_same_again(receiver: Receiver, tmp_path: Path) -> None:
    receiver.statuses = [500, 302, 429]
    before = outcomes()
    jobs = end_a_job(tmp_path, receiver.url)
    sending(jobs, lambda: len(receiver.received) == 4)
    assert len(set(receiver.ids())) == 1
    assert len({body for _, body in receiver.received}) == 1
    assert left(jobs) == 0
    assert outcomes() == before | {"refused": before["refused"] + 3, "delivered": before["delivered"] + 1}


def test_one_that_is_gone_hears_no_more(receiver: Receiver, tmp_path: Path) -> None:
    receiver.statuses = [410]
    jobs = end_a_job(tmp_path, receiver.url)
    sending(jobs, lambda: bool(receiver.received))
    assert left(jobs) == 0


def test_what_nobody_foresees_counts_as_an_attempt(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be sent again every minute for ever, in the place of others."""

    async def fail(*_: object) -> int:
        raise ExceptionGroup("no connection", [OverflowError("port")])

    monkeypatch.setattr(Webhooks, "_post", fail)
    jobs, before = end_a_job(tmp_path, receiver.url), outcomes()
    sending(jobs, lambda: outcomes() != before)
    after = outcomes()
    assert after.pop("unreachable") > before.pop("unreachable")
    assert after == before


def test_a_slow_host_gets_some_calls_at_once_and_others_are_called_meanwhile(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE_PER_HOST", 2)
    for _ in range(4):
        jobs = end_a_job(tmp_path, receiver.url)
    end_a_job(tmp_path, receiver.url.replace("127.0.0.1", "localhost"))
    receiver.answers.clear()

    async def run() -> None:
        hooks = Webhooks(jobs)
        hooks.follow(HOSTS, "HOOKS")
        async with asyncio.timeout(30):
            while len(receiver.received) < 3:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # twenty looks
            busy = sorted(headers["host"].split(":")[0] for headers, _ in receiver.received)
            assert busy == ["127.0.0.1", "127.0.0.1", "localhost"]
            receiver.answers.set()
            while left(jobs) or hooks._sending:
                await asyncio.sleep(0.01)
        assert hooks._following is not None
        hooks._following.cancel()

    asyncio.run(run())
    assert len(receiver.received) == 5


def test_a_host_that_is_not_allowed_anymore_is_not_called(receiver: Receiver, tmp_path: Path) -> None:
    """Nor is it forgotten before its time: another cluster on the same database may allow it."""
    jobs, looks = end_a_job(tmp_path, receiver.url), []
    ask = jobs.ask

    async def asked(call: Any, *args: Any) -> Any:
        answer = await ask(call, *args)
        looks.append(call)
        return answer

    jobs.ask = asked  # type: ignore[method-assign]
    sending(jobs, lambda: looks.count(JobStore.due_webhooks) > 1, hosts=("localhost",))
    assert JobStore.give_up_webhooks in looks
    assert (receiver.received, left(jobs)) == ([], 1)


def test_a_deployment_without_hosts_gives_up_in_time_what_an_earlier_one_has_left(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GIVE_UP_S", 0.0)
    jobs, before = end_a_job(tmp_path, receiver.url), outcomes()["given_up"]
    monkeypatch.setattr(outbox, "KEEP_S", 0.0)
    sending(jobs, lambda: outcomes()["given_up"] > before, hosts=())
    assert (receiver.received, left(jobs)) == ([], 0)


SENDER = """
import asyncio, sys
from service.jobs.store_actor import Jobs
from service.jobs.webhooks import Webhooks

async def send():
    jobs = Jobs()
    jobs.follow(sys.argv[1], None, 1000.0)
    Webhooks(jobs).follow(["127.0.0.1"], "HOOKS")
    await asyncio.sleep(600)

asyncio.run(send())
"""


def test_what_a_killed_sender_held_is_sent_by_another(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = end_a_job(tmp_path, receiver.url)
    receiver.answers.clear()
    killed = subprocess.Popen([sys.executable, "-c", SENDER, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not receiver.received:
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    receiver.answers.set()
    assert jobs._own is not None
    monkeypatch.setattr(jobs._own._database, "_clock", lambda: time.time() + LEASE_S)
    sending(jobs, lambda: len(receiver.received) == 2)
    assert len(set(receiver.ids())) == 1
    assert left(jobs) == 0


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://elsewhere.example.com/", "names the host 'elsewhere.example.com'"),
        ("https://hooks.example.com.evil.example/", "names the host"),
        ("https://evil.example/?hooks.example.com", "names the host"),
        ("https://hooks.example.com@evil.example/", "names the host"),
        ("https://user:secret@hooks.example.com/", "must have no user"),
        ("https://hooks.example.com/#part", "fragment"),
        ("http://hooks.example.com/", "must begin with https://"),
        ("ftp://127.0.0.1/", "must begin with https://"),
        ("https://[::1]/", "names the host"),
        ("https://2130706433/", "names the host"),
        ("https://hooks.example.com/ \n", "visible ASCII"),
        ("https://h\u043eoks.example.com/", "visible ASCII"),
        ("https://hooks.example.com:x/", "is no URL"),
        ("https://hooks.example.com:99999/", "a port from 1 to 65535"),
        ("hooks.example.com", "names the host ''"),
        ("https://hooks.example.com/" + "a" * 2000, "at most 2000"),
    ],
)
def test_other_urls_are_refused(url: str, said: str) -> None:
    async def run() -> None:
        hooks = Webhooks(Jobs())
        with pytest.raises(InvalidParameter, match="webhook_hosts names no host"):
            hooks.check("https://hooks.example.com/")
        hooks.follow(HOSTS, "HOOKS")
        hooks.check("https://hooks.example.com:8443/a?b=c")
        hooks.check("http://localhost:80/")
        with pytest.raises(InvalidParameter, match="webhook_url") as refused:
            hooks.check(url)
        assert said in str(refused.value)
        assert "secret" not in str(refused.value)

    asyncio.run(run())


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], ["93.184.215.14", "169.254.169.254"], ["127.0.0.1"], ["::ffff:10.0.0.1"], []],
    ids=str,
)
def test_a_name_that_leads_inside_is_not_called(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    monkeypatch.setattr(module.httpx, "AsyncClient", None)  # nothing is called

    async def run() -> None:
        hooks = Webhooks(Jobs())
        hooks.follow(HOSTS, "HOOKS")
        with pytest.raises(AddressRefused, match="the host 'hooks"):
            await hooks._post(Delivery("msg_1", "job_1", "https://hooks.example.com/", "{}", 1))

    asyncio.run(run())


def test_a_host_is_called_at_the_address_that_was_looked_at(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    """A name that is looked up again could lead elsewhere by then."""
    looked: list[str] = []
    port = receiver.server_address[1]

    def found(host: str, *_: Any, **__: Any) -> list[Any]:
        looked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", found)

    async def run() -> None:
        hooks = Webhooks(Jobs())
        hooks.follow(HOSTS, "HOOKS")
        assert await hooks._post(Delivery("msg_1", "job_1", f"http://localhost:{port}/", "{}", 1)) == 200

    asyncio.run(run())
    assert looked.count("localhost") == 1
    assert receiver.received[0][0]["host"] == f"localhost:{port}"


@pytest.mark.parametrize("value", ["", "   ", "whsec_", f"{KEY} whsec_!"])
def test_keys_that_are_none_are_refused_and_not_told(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOKS", value)
    with pytest.raises(SpecError, match="HOOKS") as refused:
        Webhooks(Jobs()).follow(HOSTS, "HOOKS")
    assert KEY not in str(refused.value)

    async def follow() -> None:
        Webhooks(Jobs()).follow((), "HOOKS")  # nobody is called, so nothing is signed

    asyncio.run(follow())


def test_what_a_deployment_may_say() -> None:
    assert GatewaySpec(webhook_hosts=("hooks.example.com", "::1"), webhook_key_env="HOOKS").webhook_hosts
    with pytest.raises(ValueError, match="webhook_hosts needs webhook_key_env"):
        GatewaySpec(webhook_hosts=("hooks.example.com",))
    for wrong in ("https://a.example", "a.example:443", "*.example.com", "A.example", ""):
        with pytest.raises(ValueError, match="is no host"):
            GatewaySpec(webhook_hosts=(wrong,), webhook_key_env="HOOKS")


def test_attempts_are_spread_over_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pauses = [module._pause_s(attempt) for attempt in range(1, 12)]
    assert pauses[0] < 6
    assert all(later >= 0.9 * earlier for earlier, later in itertools.pairwise(pauses))
    assert sum(pauses) < KEEP_S < sum(pauses) + 4 * module.AGAIN_S[-1]
